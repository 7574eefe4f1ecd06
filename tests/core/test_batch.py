"""Batches: what is done is skipped, what fails is told, and a kill at any moment leaves no wrong file under a final name."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from core.compressors import LOG, lora_file, to_half
from safetensors import safe_open
from safetensors.torch import load_file

from lora_compress import CompressionSettings, SettingsError
from lora_compress.batch import CompressOptions, Job, plan_jobs, run_job, run_local, worker_count
from lora_compress.batch.marker import MARKER_KEY, fingerprint, is_done, make_marker

ROOT = Path(__file__).resolve().parents[2]


def _options(**values: Any) -> CompressOptions:
    return CompressOptions(CompressionSettings.parse({"rank_ratio": 0.5}), **values)


def _is_half(target: Path, source: Path) -> bool:
    made, was = load_file(target), load_file(source)
    return made.keys() == was.keys() and all(torch.equal(made[key], was[key].half()) for key in was)


def test_a_folder_keeps_its_shape_and_hidden_files_stay_out(tmp_path: Path) -> None:
    tmp_path = tmp_path / "a [b] *"  # names that a pattern would read as wildcards
    for place in ("a.safetensors", "deep/er/b.safetensors", ".c.tmp.safetensors", "old.ckpt"):
        lora_file(tmp_path / "in" / place)
    (tmp_path / "in" / "readme.txt").write_text("no LoRA")
    jobs = plan_jobs(str(tmp_path / "in"), str(tmp_path / "in" / "small"))
    (tmp_path / "in" / "small").mkdir()
    lora_file(tmp_path / "in" / "small" / "a.safetensors")
    assert plan_jobs(str(tmp_path / "in"), str(tmp_path / "in" / "small")) == jobs  # outputs are no inputs
    places = {os.path.relpath(job.source, tmp_path / "in"): os.path.relpath(job.target, tmp_path / "in" / "small") for job in jobs}
    assert places == {
        "a.safetensors": "a.safetensors",
        os.path.join("deep", "er", "b.safetensors"): os.path.join("deep", "er", "b.safetensors"),
        "old.ckpt": "old.safetensors",
    }


def test_a_pattern_keeps_what_follows_its_first_wildcard(tmp_path: Path) -> None:
    for place in ("x/one.safetensors", "y/one.safetensors", "y/two.safetensors"):
        lora_file(tmp_path / place)
    jobs = plan_jobs(str(tmp_path / "*" / "one*"), str(tmp_path / "out"))
    assert [os.path.relpath(job.target, tmp_path / "out") for job in jobs] == [
        os.path.join("x", "one.safetensors"),
        os.path.join("y", "one.safetensors"),
    ]


def test_clashes_are_refused_before_any_work(tmp_path: Path) -> None:
    for place in ("a.safetensors", "a.pt", "b.safetensors", "b.kohya.safetensors"):
        lora_file(tmp_path / "in" / place)
    with pytest.raises(SettingsError, match=r"would both become .*a\.safetensors: rename"):
        plan_jobs(str(tmp_path / "in"), str(tmp_path / "out"))
    os.unlink(tmp_path / "in" / "a.pt")
    assert len(plan_jobs(str(tmp_path / "in"), str(tmp_path / "out"))) == 3
    with pytest.raises(SettingsError, match=r"b\.kohya\.safetensors: rename"):
        plan_jobs(str(tmp_path / "in"), str(tmp_path / "out"), partner=True)
    with pytest.raises(SettingsError, match=r"3 inputs would be overwritten.*--force"):
        plan_jobs(str(tmp_path / "in"), str(tmp_path / "in"))
    assert len(plan_jobs(str(tmp_path / "in"), str(tmp_path / "in"), force=True)) == 3
    with pytest.raises(SettingsError, match="matches no"):
        plan_jobs(str(tmp_path / "none*"), str(tmp_path / "out"))


def test_what_is_done_is_skipped_until_input_or_settings_change(tmp_path: Path) -> None:
    source, target = lora_file(tmp_path / "a.safetensors"), tmp_path / "out" / "a.safetensors"
    job = Job(str(source), str(target))
    assert run_job(job, _options(), to_half)["status"] == "written"
    assert _is_half(target, source)
    assert run_job(job, _options(), to_half)["status"] == "skipped"
    other = CompressOptions(CompressionSettings.parse({"rank_ratio": 0.4}))
    assert run_job(job, other, to_half)["status"] == "written"
    assert run_job(job, CompressOptions(other.settings, save_dtype=torch.float16), to_half)["status"] == "written"
    assert run_job(job, _options(), to_half)["status"] == "written"
    before = os.path.getmtime(source)
    lora_file(source, seed=1)
    os.utime(source, (before - 1000, before - 1000))  # another input, and an older one
    assert run_job(job, _options(), to_half)["status"] == "written"
    assert _is_half(target, source)
    os.utime(source, (time.time() + 10, time.time() + 10))
    assert run_job(job, _options(), to_half)["status"] == "written"


def test_where_the_work_is_done_does_not_change_the_marker(tmp_path: Path) -> None:
    source = str(lora_file(tmp_path / "a.safetensors"))
    settings = CompressionSettings.parse({"rank_ratio": 0.5})
    object.__setattr__(settings, "quantization_device", "cuda")
    assert make_marker(source, CompressOptions(settings)) == make_marker(source, _options())
    assert make_marker(source, _options(consumers=("comfyui",))) != make_marker(source, _options())


def test_the_marker_is_in_the_metadata_of_what_is_written(tmp_path: Path) -> None:
    source, target = lora_file(tmp_path / "a.safetensors", size=640), tmp_path / "small.safetensors"
    options = CompressOptions(CompressionSettings.parse({"bits": 4}))
    assert run_job(Job(str(source), str(target)), options)["status"] == "written"
    with safe_open(target, framework="pt") as file:
        assert file.metadata()[MARKER_KEY] == make_marker(str(source), options)
    assert run_job(Job(str(source), str(target)), options)["status"] == "skipped"


def test_a_fingerprint_sees_one_changed_block_and_the_length(tmp_path: Path) -> None:
    path = tmp_path / "data"
    data = bytearray(os.urandom(1_000_000))
    path.write_bytes(data)
    first = fingerprint(str(path))
    path.write_bytes(data + b"\0")
    assert fingerprint(str(path)) != first
    for place in (0, 999_999, (1_000_000 - 16384) * 7 // 15 + 5):
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(changed)
        assert fingerprint(str(path)) != first, place


def test_a_size_budget_holds_with_the_marker(tmp_path: Path) -> None:
    job = Job(str(lora_file(tmp_path / "a.safetensors", size=4096)), str(tmp_path / "b.safetensors"))
    settings = CompressionSettings.parse({"target_size": "30kB", "strategy": "mixed"})
    outcome = run_job(job, CompressOptions(settings))
    assert 28_000 < outcome["bytes_out"] <= 30_000
    assert outcome["bytes_out"] == os.path.getsize(job.target)


def test_files_of_others_are_not_overwritten(tmp_path: Path) -> None:
    source, precious = lora_file(tmp_path / "in" / "a.safetensors"), lora_file(tmp_path / "out" / "a.safetensors", seed=7)
    job = Job(str(source), str(precious))
    content = precious.read_bytes()
    outcome = run_job(job, _options(), to_half)
    assert outcome["status"] == "failed" and "--force" in outcome["error"]
    assert precious.read_bytes() == content
    assert run_job(job, _options(force=True), to_half)["status"] == "written"


def test_uncompressible_files_are_copied_only_if_asked(tmp_path: Path) -> None:
    source, target = lora_file(tmp_path / "a.safetensors", marker="compact"), tmp_path / "out" / "a.safetensors"
    job = Job(str(source), str(target))
    assert run_job(job, _options(), to_half)["status"] == "not_smaller"
    assert not target.exists()
    outcome = run_job(job, _options(copy_uncompressible=True), to_half)
    assert outcome["status"] == "copied" and outcome["output"] == str(target)
    assert target.read_bytes() == source.read_bytes()
    assert run_job(job, _options(copy_uncompressible=True), to_half)["status"] == "skipped"


def test_a_batch_survives_bad_files_and_dead_processes(tmp_path: Path) -> None:
    kinds = {"good1": None, "bad": "bad", "unforeseen": "unforeseen", "deadly": "deadly", "good2": None, "good3": None}
    for index, (name, marker) in enumerate(kinds.items()):
        lora_file(tmp_path / "in" / f"{name}.safetensors", index, marker=marker)
    (tmp_path / "in" / "torn.safetensors").write_bytes(b"\xff" * 100)
    jobs = plan_jobs(str(tmp_path / "in"), str(tmp_path / "out"))
    outcomes = {Path(outcome["input"]).stem: outcome for outcome in run_local(jobs, _options(), 2, to_half)}
    assert len(outcomes) == 7
    assert {name for name, outcome in outcomes.items() if outcome["status"] == "failed"} == {"bad", "unforeseen", "deadly", "torn"}
    assert "is refused" in outcomes["bad"]["error"]
    assert "ZeroDivisionError: nobody thought of this" in outcomes["unforeseen"]["error"]
    assert "process died" in outcomes["deadly"]["error"]
    for name in ("good1", "good2", "good3"):
        assert _is_half(tmp_path / "out" / f"{name}.safetensors", tmp_path / "in" / f"{name}.safetensors")


def test_workers_fit_cores_files_and_memory(tmp_path: Path) -> None:
    jobs = [Job(str(lora_file(tmp_path / f"{i}.safetensors", i)), "") for i in range(5)]
    assert worker_count(jobs, _options(), cores=3, memory=10**12) == 3
    assert worker_count(jobs, _options(), cores=64, memory=10**12) == 5
    assert worker_count(jobs, _options(), cores=64, memory=2 * 10**9) == 2
    assert worker_count(jobs, _options(), cores=64, memory=0) == 1


_KILLED = """
import sys
from core.compressors import slowly_to_half
from lora_compress import CompressionSettings
from lora_compress.batch import CompressOptions, plan_jobs, run_local

if __name__ == "__main__":
    options = CompressOptions(CompressionSettings.parse({"rank_ratio": 0.5}))
    for outcome in run_local(plan_jobs(sys.argv[1], sys.argv[2]), options, 2, slowly_to_half):
        print(outcome["status"], flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is not of Windows")
def test_a_killed_batch_leaves_no_wrong_file_and_can_be_resumed(tmp_path: Path) -> None:
    """SIGKILL to the process that runs the batch, three times; its workers have to end by themselves."""
    sources = [lora_file(tmp_path / "in" / f"{i}.safetensors", i, size=3000) for i in range(12)]
    script = tmp_path / "run.py"
    script.write_text(_KILLED, encoding="utf-8")
    command = [sys.executable, str(script), str(tmp_path / "in"), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = 0
    for moment in (0.02, 0.11, 0.19):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert process.stdout is not None and process.stdout.readline()  # the first file is done
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert _group_ends(process.pid), "workers outlive the batch"
        final = [path for path in (tmp_path / "out").glob("*") if not path.name.startswith(".")]
        assert all(_is_half(path, tmp_path / "in" / path.name) for path in final)
        done = max(done, len(final))
    assert done < len(sources), "the kills came too late to test anything"
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    statuses = finished.stdout.split()
    assert len(statuses) == len(sources) and set(statuses) == {"written", "skipped"}, finished.stderr
    assert all(_is_half(tmp_path / "out" / source.name, source) for source in sources)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {source.name for source in sources}  # nothing left over


def _group_ends(group: int, patience: float = 10.0) -> bool:
    """Whether all processes of a group are gone soon."""
    for _ in range(int(patience / 0.05)):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        if not _alive(group):
            return True
        time.sleep(0.05)
    return False


def _alive(group: int) -> bool:
    """Whether a process of the group is more than a zombie that nobody waits for (Linux)."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            return True
    return False


def test_urls_go_through_fsspec(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    try:
        for name, marker in (("one", None), ("deep/two", None), ("compact", "compact"), ("bad", "bad")):
            local = lora_file(tmp_path / f"{Path(name).name}.safetensors", len(name), marker=marker)
            memory.makedirs(f"/batch-in/{Path(name).parent}", exist_ok=True)
            memory.put_file(str(local), f"/batch-in/{name}.safetensors")
        jobs = plan_jobs("memory://batch-in", "memory://batch-out")
        assert [job.target for job in jobs if "two" in job.source] == ["memory://batch-out/deep/two.safetensors"]
        options = _options(copy_uncompressible=True)
        outcomes = {Path(job.source).stem: run_job(job, options, to_half) for job in jobs}
        statuses = {name: outcome["status"] for name, outcome in outcomes.items()}
        assert statuses == {"one": "written", "two": "written", "compact": "copied", "bad": "failed"}
        assert outcomes["bad"]["error"] == "memory://batch-in/bad.safetensors: bad: is refused"
        again = {Path(job.source).stem: run_job(job, options, to_half)["status"] for job in jobs}
        assert again == {"one": "skipped", "two": "skipped", "compact": "skipped", "bad": "failed"}
        memory.get_file("/batch-out/deep/two.safetensors", str(tmp_path / "made.safetensors"))
        assert _is_half(tmp_path / "made.safetensors", tmp_path / "two.safetensors")
    finally:
        for folder in ("/batch-in", "/batch-out"):
            if memory.exists(folder):
                memory.rm(folder, recursive=True)


def test_file_urls_are_renamed_into_place(tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    source = lora_file(tmp_path / "in" / "a.safetensors")
    jobs = plan_jobs(f"file://{tmp_path}/in", f"file://{tmp_path}/out")
    assert [outcome["status"] for outcome in run_local(jobs, _options(), 1, to_half)] == ["written"]
    assert _is_half(tmp_path / "out" / "a.safetensors", source)
    assert os.listdir(tmp_path / "out") == ["a.safetensors"]


def test_every_file_is_compressed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOG, str(tmp_path / "log"))
    names = [lora_file(tmp_path / "in" / f"{i}.safetensors", i).name for i in range(4)]
    jobs = plan_jobs(str(tmp_path / "in"), str(tmp_path / "out"))
    for expected in ("written", "skipped"):
        assert {outcome["status"] for outcome in run_local(jobs, _options(), 2, to_half)} == {expected}
    assert sorted((tmp_path / "log").read_text().split()) == names


def test_an_unmarked_output_of_ours_is_made_again(tmp_path: Path) -> None:
    """A kill between the file and its marker: the file is right, and not known to be."""
    source, target = lora_file(tmp_path / "a.safetensors"), tmp_path / "out" / "a.safetensors"
    to_half(str(source), str(target), CompressionSettings(), details={"by": "a test"})
    assert not is_done(str(source), str(target), make_marker(str(source), _options()))
    assert run_job(Job(str(source), str(target)), _options(), to_half)["status"] == "written"


def test_outcomes_are_json(tmp_path: Path) -> None:
    shutil.copy(lora_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors")
    outcome = run_job(Job(str(tmp_path / "a.safetensors"), str(tmp_path / "c.safetensors")), _options(), to_half)
    assert json.loads(json.dumps(outcome))["notes"] == ["halved"]


def test_what_was_damaged_after_it_was_written_is_made_again(tmp_path: Path) -> None:
    source, target = lora_file(tmp_path / "a.safetensors", size=640), tmp_path / "out" / "a.safetensors"
    options = CompressOptions(CompressionSettings.parse({"bits": 4, "save_format": "both"}))
    job = Job(str(source), str(target))
    assert run_job(job, options)["status"] == "written"
    assert run_job(job, options)["status"] == "skipped"
    for damaged in (target, target.with_suffix(".kohya.safetensors")):
        whole = damaged.read_bytes()
        for wrong in (whole[:-1], whole + b"\0", whole[:-1] + bytes([whole[-1] ^ 1])):
            damaged.write_bytes(wrong)
            assert run_job(job, options)["status"] == "written"
            assert damaged.read_bytes() == whole
        damaged.unlink()
        assert run_job(job, options)["status"] == "written"
        assert damaged.read_bytes() == whole
    assert run_job(job, options)["status"] == "skipped"


def test_a_copy_counts_as_done_if_every_byte_is_the_same(tmp_path: Path) -> None:
    source, target = lora_file(tmp_path / "a.safetensors", size=20_000), tmp_path / "out.safetensors"
    options = CompressOptions(CompressionSettings.parse({}), copy_uncompressible=True)
    job = Job(str(source), str(target))
    assert run_job(job, options)["status"] == "copied"
    assert run_job(job, options)["status"] == "skipped"
    data = bytearray(target.read_bytes())
    data[len(data) // 2] ^= 1
    target.write_bytes(data)
    assert fingerprint(str(source)) == fingerprint(str(target)), "the changed byte lies in a block that the fingerprint reads"
    assert run_job(job, options)["status"] != "skipped"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_a_batch_goes_on_past_what_is_no_regular_file(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    lora_file(folder / "good.safetensors")
    os.mkfifo(folder / "fifo.safetensors")
    (folder / "gone.safetensors").symlink_to("nowhere")
    (folder / "link.safetensors").symlink_to("good.safetensors")
    (folder / "folder.safetensors").mkdir()
    jobs = plan_jobs(str(folder), str(tmp_path / "out"))
    assert worker_count(jobs, _options(), cores=2, memory=10**12) == 2
    found = {Path(job.source).name: run_job(job, _options(), to_half) for job in jobs}
    assert {name: outcome["status"] for name, outcome in found.items()} == {
        "good.safetensors": "written",
        "link.safetensors": "written",
        "fifo.safetensors": "failed",
        "gone.safetensors": "failed",
    }
    assert "is a FIFO: only regular files are read" in found["fifo.safetensors"]["error"]
    assert found["gone.safetensors"]["error"].endswith("gone.safetensors: no such file")
