"""Files to files: what is written when, what stays as it was, and what cutting a progressive one leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from core.factories import random_update
from core.layouts.files import dense, save
from core.mutations import pack, unpack
from core.samples import dense_file, kohya_file, packed_file, relative_error, sample, sample_file
from safetensors.torch import load_file, save_file

from lora_compress import CompressionSettings, FormatError, SaveError, SettingsError, as_kohya, load_lora
from lora_compress.engine.to_file import compress_file
from lora_compress.engine.unpack import expand_file, truncate_file
from lora_compress.packed.file import PackedFile

ROOT = Path(__file__).resolve().parents[2]
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs signals and file limits")
NO_SIZE = {"new_rank": 100}


def settings(**values: object) -> CompressionSettings:
    return CompressionSettings.parse(values)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return kohya_file(tmp_path / "lora.safetensors")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine modules of rank 32 whose spectra fall as 1/i."""
    return kohya_file(tmp_path_factory.mktemp("network") / "lora.safetensors", count=9, width=512, rank=32, convolutions=False)


# What is written


def test_what_gets_no_smaller_is_not_written(source: Path, tmp_path: Path) -> None:
    report = compress_file(source, tmp_path / "out.safetensors", settings(**NO_SIZE))
    assert (report.status, report.output) == ("not_smaller", None)
    assert report.bytes[1] >= report.bytes[0] == source.stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_what_was_there_stays_when_nothing_is_written(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.safetensors"
    target.write_text("old")
    assert compress_file(source, target, settings(**NO_SIZE)).status == "not_smaller"
    assert target.read_text() == "old"


@pytest.mark.parametrize("values", [NO_SIZE, {"bits": 8}, {"bits": 8, "save_format": "both"}], ids=str)
def test_a_size_that_is_accepted_by_name_is_written_however_large(values: dict[str, object], tmp_path: Path) -> None:
    source = save(sample("kohya", "lora_unet_m", 3, 3, 1)[0], tmp_path)
    target = tmp_path / "out.safetensors"
    for precision in (None, torch.float32):
        assert compress_file(source, target, settings(**values), save_dtype=precision).status == "not_smaller"
        assert not target.exists()
    report = compress_file(source, target, settings(**values, allow_larger=True), save_dtype=torch.float32)
    assert report.status == "written"
    assert report.bytes == (source.stat().st_size, target.stat().st_size)
    assert report.bytes[1] > report.bytes[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("asked", [None, torch.float32, torch.float16, torch.bfloat16])
def test_factors_have_the_precision_that_was_asked_for_or_that_of_the_input(dtype, asked, tmp_path: Path) -> None:
    source = save(sample("kohya", "lora_unet_m", 60, 50, 8, dtype=dtype)[0], tmp_path)
    compress_file(source, tmp_path / "out.safetensors", settings(new_rank=3, allow_larger=True), save_dtype=asked)
    factors = [tensor for key, tensor in load_file(tmp_path / "out.safetensors").items() if not key.endswith("alpha")]
    assert {factor.dtype for factor in factors} == {asked or dtype}
    assert len(factors) == 2


def test_an_output_that_is_the_input_needs_force(source: Path) -> None:
    before = source.read_bytes()
    link = source.with_name("link.safetensors")
    link.symlink_to(source)
    for target in (source, source.parent / "." / source.name, link):
        with pytest.raises(SettingsError, match=r"is the input itself: choose another name, or --force"):
            compress_file(source, target, settings(bits=4))
        assert source.read_bytes() == before
    exact = dense_file(source)
    report = compress_file(source, source, settings(bits=8), force=True)
    assert report.bytes == (len(before), source.stat().st_size)
    assert relative_error(load_lora(source).updates, exact) == pytest.approx(report.relative_error, rel=1e-3)


@pytest.mark.parametrize("values", [{"new_rank": 4}, {"bits": 4, "save_format": "both"}, {"save_format": "fp8"}], ids=str)
def test_an_input_that_is_replaced_is_read_to_its_end_first(values: dict[str, object], source: Path, tmp_path: Path) -> None:
    compress_file(source, tmp_path / "beside.safetensors", settings(**values))
    compress_file(source, source, settings(**values), force=True)
    assert source.read_bytes() == (tmp_path / "beside.safetensors").read_bytes()


def test_the_same_input_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for values in ({"bits": 4}, {"strategy": "entropy", "target_error": 0.1}, {"new_rank": 3}, {"strategy": "mixed", "bits": 3}):
        for name in ("a", "b"):
            compress_file(source, tmp_path / f"{name}.safetensors", settings(**values))
        assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_progress_is_told_to_the_last_module(source: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    for values in ({"bits": 4}, {"new_rank": 2}):
        compress_file(source, tmp_path / "out.safetensors", settings(**values), progress=lambda *pair: told.append(pair))
    assert told == 4 * [(done, 6) for done in range(1, 7)]  # of each file the spectra, then the modules
    told.clear()
    values = {"strategy": "entropy", "target_size": "3kB"}  # a search: several passes, each told to its last module
    compress_file(source, tmp_path / "out.safetensors", settings(**values), progress=lambda *pair: told.append(pair))
    ends = [place for place, (done, total) in enumerate(told) if done == total]
    assert ends and ends[-1] == len(told) - 1
    starts = [0, *(place + 1 for place in ends[:-1])]
    assert all([done for done, _ in told[a : b + 1]] == list(range(1, told[b][1] + 1)) for a, b in zip(starts, ends, strict=True))


# What cannot be written


@pytest.mark.parametrize("values", [{"bits": 4}, {"new_rank": 2}, {"bits": 4, "save_format": "both"}], ids=str)
def test_a_folder_that_is_none_is_a_save_error(values: dict[str, object], source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "folder.safetensors").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for where in ("file/out.safetensors", "folder.safetensors"):
        with pytest.raises(SaveError, match=f"^{tmp_path / where}: cannot be written"):
            compress_file(source, tmp_path / where, settings(**values))
    assert sorted(tmp_path.rglob("*")) == before


SMALL_DISK = """
import resource, signal, sys
from lora_compress import CompressionSettings, SaveError
from lora_compress.engine.to_file import compress_file
from lora_compress.engine.unpack import expand_file, truncate_file
source, packed, target = sys.argv[1:]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
for write in (
    lambda: compress_file(source, target, CompressionSettings.parse({"new_rank": 8})),
    lambda: compress_file(source, target, CompressionSettings.parse({"bits": 8})),
    lambda: compress_file(source, target, CompressionSettings.parse({"bits": 8, "save_format": "both"})),
    lambda: expand_file(packed, target),
    lambda: truncate_file(packed, target, 12_000),
):
    try:
        write()
    except SaveError as error:
        print(error)
"""


@posix
def test_a_full_disk_is_one_clear_error_and_harms_nothing(source: Path, tmp_path: Path) -> None:
    packed = packed_file("progressive", source, tmp_path / "packed.safetensors")
    target = tmp_path / "out.safetensors"
    target.write_text("old")
    before = sorted(path.name for path in tmp_path.iterdir())
    command = [sys.executable, "-c", SMALL_DISK, str(source), str(packed), str(target)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    errors = done.stdout.splitlines()
    assert len(errors) == 5
    for error in errors:
        assert ": cannot be written (" in error and "free disk space or choose another output folder" in error
    assert target.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == before


KILLED = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from lora_compress import CompressionSettings, load_lora
from lora_compress.engine.to_file import compress_file
source, target = sys.argv[1:]
forms = [{"new_rank": 8}, {"bits": 8}, {"bits": 4}]
wanted, begun = [], time.monotonic()
for values in forms:
    compress_file(source, target, CompressionSettings.parse(values))
    wanted.append(open(target, "rb").read())
os.unlink(target)
once = (time.monotonic() - begun) / len(forms)
roll, seen = random.Random(0), set()
for attempt in range(50):  # on a busy machine a child may not come far
    if attempt >= 8 and len(seen) >= 2:
        break
    if (child := os.fork()) == 0:
        while True:
            for values in forms:
                compress_file(source, target, CompressionSettings.parse(values))
    time.sleep(roll.uniform(0.5, 5.0) * once)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if os.path.exists(target):
        seen.add(wanted.index(open(target, "rb").read()))
print(len(seen))
"""


@posix
def test_a_process_that_is_killed_leaves_a_whole_file_or_none(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "out.safetensors")]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 2, "the children never came to write"
    left = {path.name for path in tmp_path.iterdir()} - {source.name, "out.safetensors"}
    assert len(left) <= 1 and all(name.startswith(".out.") and name.endswith(".tmp.safetensors") for name in left)
    compress_file(source, tmp_path / "out.safetensors", settings(bits=4))
    assert {path.name for path in tmp_path.iterdir()} == {source.name, "out.safetensors"}, "the next one clears up"


@posix
def test_an_interrupt_leaves_what_was_there(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.safetensors"
    target.write_text("old")

    def interrupt(done: int, total: int) -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job has it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            compress_file(source, target, settings(new_rank=2), progress=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert target.read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {source.name, target.name}


@pytest.mark.parametrize("values", [{"bits": 4}, {"new_rank": 1}, {"strategy": "entropy", "target_error": 0.2}], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused_with_the_module(values: dict[str, object], bad: float, tmp_path: Path) -> None:
    tensors = sample("kohya", "lora_unet_a")[0] | sample("kohya", "lora_unet_b")[0]
    tensors["lora_unet_b.lora_up.weight"][1, 1] = bad
    with pytest.raises(FormatError, match=r"lora_unet_b: its factors or its alpha hold NaN or infinity"):
        compress_file(save(tensors, tmp_path), tmp_path / "out.safetensors", settings(**values))
    assert not (tmp_path / "out.safetensors").exists()


# Truncation of progressive files

PROGRESSIVE = {"strategy": "entropy", "progressive": True, "target_error": 0.04}


def test_a_truncated_file_is_as_good_as_a_fresh_one(network: Path, tmp_path: Path) -> None:
    """It keeps to its size, has every module, and takes at most a tenth more bytes than a fresh one of its error."""
    whole, exact = tmp_path / "whole.safetensors", dense_file(network)
    compress_file(network, whole, settings(**PROGRESSIVE))
    errors = []
    for share in (0.9, 0.6, 0.4, 0.25):
        cut, size = tmp_path / f"{share}.safetensors", int(share * whole.stat().st_size)
        report = truncate_file(whole, cut, size)
        assert cut.stat().st_size == report.bytes[1] <= size
        assert report.bytes[1] > 0.9 * size
        loaded = load_lora(cut)
        assert loaded.updates.keys() == exact.keys()
        errors.append(relative_error(loaded.updates, exact))
        fresh = compress_file(
            network, tmp_path / "fresh.safetensors", settings(strategy="entropy", refine=False, target_error=errors[-1])
        )
        assert report.bytes[1] <= 1.1 * fresh.bytes[1], f"{report.bytes[1] / fresh.bytes[1]:.3f} at error {errors[-1]:.3f}"
    assert errors == sorted(errors)


def test_the_finer_a_file_the_less_of_it_makes_a_rough_one(network: Path, tmp_path: Path) -> None:
    """The smallest cut leaves a like error, whatever the whole file was made for."""
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    exact, errors = dense_file(network), []
    for target in (0.02, 0.002, 0.0002):
        compress_file(network, whole, settings(**PROGRESSIVE | {"target_error": target}))
        sizes = range(1000, whole.stat().st_size, 200)
        for size in sizes:
            with suppress(FormatError):
                truncate_file(whole, cut, size)
                break
        errors.append(relative_error(load_lora(cut).updates, exact))
        assert cut.stat().st_size < 20_000 < whole.stat().st_size
    assert min(errors) > 0.3, errors


def test_a_truncated_file_can_be_truncated_and_expanded(network: Path, tmp_path: Path) -> None:
    whole, once, twice, direct = (tmp_path / f"{name}.safetensors" for name in ("whole", "once", "twice", "direct"))
    compress_file(network, whole, settings(**PROGRESSIVE))
    size = whole.stat().st_size
    truncate_file(whole, once, size * 2 // 3)
    truncate_file(once, twice, size // 3)
    truncate_file(whole, direct, size // 3)
    assert twice.read_bytes() == direct.read_bytes()
    truncate_file(twice, twice, size // 4, force=True)
    assert twice.stat().st_size <= size // 4
    expand_file(twice, tmp_path / "plain.safetensors", save_dtype=torch.float32)
    plain = load_lora(tmp_path / "plain.safetensors").updates
    for name, update in load_lora(twice).updates.items():
        assert plain[name].rank == max(update.rank, 2), "what the cut file does not tell of is no zeros in the plain one"
        assert float((dense(plain[name]) - dense(update)).norm()) <= 1e-6 * float(dense(update).norm())


def test_a_truncated_file_lists_what_it_tells_of_and_what_programs_know_it_by(tmp_path: Path) -> None:
    names = [f"lora_unet_down_blocks_{i}_attentions_0_transformer_blocks_0_attn1_to_q" for i in range(6)]
    known_by = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    updates = {name: random_update(8, 96, 96, seed=i, magnitude=1.0 if i < 3 else 0.1) for i, name in enumerate(names)}
    updates[known_by] = random_update(8, 768, 96, seed=9, magnitude=0.05)
    source, whole, cut = (tmp_path / f"{name}.safetensors" for name in ("source", "whole", "cut"))
    save_file(as_kohya(updates), source)
    compress_file(source, whole, settings(strategy="entropy", progressive=True, target_error=0.003))
    assert list(load_lora(whole).updates) == sorted(updates)
    report = truncate_file(whole, cut, whole.stat().st_size // 3)
    assert set(load_lora(cut).updates) == {*names[:3], known_by}
    assert {module.name: module.rank[1] for module in report.modules if module.name in names[3:]} == dict.fromkeys(names[3:], 0)
    assert report.relative_error == pytest.approx(relative_error(load_lora(cut).updates, dense_file(whole)), rel=1e-3)
    expand_file(cut, tmp_path / "plain.safetensors")
    assert set(load_lora(tmp_path / "plain.safetensors").updates) == {*names[:3], known_by}


def test_the_raw_beginning_of_a_file_can_be_truncated(network: Path, tmp_path: Path) -> None:
    whole, part = tmp_path / "whole.safetensors", tmp_path / "part.safetensors"
    compress_file(network, whole, settings(**PROGRESSIVE))
    data = whole.read_bytes()
    part.write_bytes(data[: len(data) * 2 // 3])
    report = truncate_file(part, tmp_path / "cut.safetensors", len(data))
    assert report.bytes[1] <= len(data) * 2 // 3 + 100
    found, wanted = load_lora(tmp_path / "cut.safetensors").updates, PackedFile(part)
    assert all(torch.equal(found[name].down, wanted[name].down) for name in wanted)
    assert PackedFile(tmp_path / "cut.safetensors").complete


def test_truncation_tells_what_it_cost(network: Path, tmp_path: Path) -> None:
    """Of the file that was truncated, not of the LoRA that it was made of; the metadata are those of the truncated file."""
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    compress_file(network, whole, settings(**PROGRESSIVE))
    report = truncate_file(whole, cut, whole.stat().st_size // 2)
    assert report.relative_error == pytest.approx(relative_error(load_lora(cut).updates, dense_file(whole)), rel=1e-3)
    for name, value in load_lora(whole).metadata.items():
        if not name.startswith(("sshs_", "ss_compress_")):
            assert load_lora(cut).metadata[name] == value


@pytest.mark.parametrize(
    ("form", "size", "message"),
    [
        ("int4", 9000, "is not progressive"),
        ("entropy", 9000, "is not progressive"),
        ("progressive", 1200, "bytes have no room for the first layer of every module"),
        ("progressive", -1, "bytes have no room for the first layer of every module"),
    ],
)
def test_what_cannot_be_truncated_is_refused(form: str, size: int, message: str, source: Path, tmp_path: Path) -> None:
    packed = packed_file(form, source, tmp_path / "packed.safetensors")
    with pytest.raises(FormatError, match=message):
        truncate_file(packed, tmp_path / "cut.safetensors", size)
    assert not (tmp_path / "cut.safetensors").exists()


@pytest.mark.parametrize("layers", [[3], "12", None, 1.5, 2**70])
def test_layers_that_are_no_number_are_refused(layers: object, source: Path, tmp_path: Path) -> None:
    packed = packed_file("progressive", source, tmp_path / "packed.safetensors")
    metadata, index, payload, others = unpack(packed.read_bytes())
    index["modules"]["parameters"][1]["layers"] = layers
    packed.write_bytes(pack(metadata, index, payload, others))
    with pytest.raises(FormatError, match=r"layers|parameters"):
        truncate_file(packed, tmp_path / "cut.safetensors", packed.stat().st_size * 2 // 3)
    assert not (tmp_path / "cut.safetensors").exists()


def test_a_plain_file_is_neither_expanded_nor_truncated(source: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is no packed file: there is nothing to expand"):
        expand_file(source, tmp_path / "out.safetensors")
    with pytest.raises(FormatError, match="no packed LoRA"):
        truncate_file(source, tmp_path / "out.safetensors", 1000)


def test_every_layout_is_compressed_and_expanded(tmp_path: Path) -> None:
    for layout in ("peft", "diffusers", "loha", "control_lora", "full", "mid"):
        source = sample_file(layout, tmp_path, name="source.safetensors")
        exact = dense_file(source)
        packed, plain = tmp_path / "packed.safetensors", tmp_path / "plain.safetensors"
        compress_file(source, packed, settings(bits=8, allow_larger=True))
        expand_file(packed, plain)
        assert relative_error(load_lora(plain).updates, exact) < 0.02, layout


def test_an_update_beyond_the_range_of_fp8_is_refused_and_the_error_of_others_is_a_number(tmp_path: Path) -> None:
    name = "lora_unet_mid_block_attentions_0_proj_in"
    generator = torch.Generator().manual_seed(0)
    source, target = tmp_path / "large.safetensors", tmp_path / "out.safetensors"
    tensors = {
        f"{name}.lora_down.weight": torch.randn(8, 320, generator=generator) * 1e25,
        f"{name}.lora_up.weight": torch.randn(320, 8, generator=generator) * 1e25,
        f"{name}.alpha": torch.tensor(8.0),
    }
    save_file(tensors, source)
    with pytest.raises(FormatError, match="allowed in fp8"):
        compress_file(source, target, CompressionSettings.parse({"save_format": "fp8"}))
    assert not target.exists()
    assert 0.0 < compress_file(source, target, CompressionSettings.parse({"bits": 4})).relative_error < 0.2
