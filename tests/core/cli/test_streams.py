"""What commands show of foreign text, on streams that cannot take everything, and how they end when they are told to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from core.factories import mixed_updates
from safetensors.torch import save_file

from lora_compress import as_kohya
from lora_compress.cli import main
from lora_compress.inspection.file import inspect_file

ROOT = Path(__file__).resolve().parents[3]
COMMAND = [sys.executable, str(ROOT / "resize_lora_ext.py")]
EVIL = "\x1b[31m\x07\x9b2J\u202e[bold][/]:heart:"
FORBIDDEN = set("\x1b\x07\x9b\u202e")
posix = pytest.mark.skipif(os.name == "nt", reason="a file system or a shell of Unix")


def lora_file(path: Path) -> Path:
    """A LoRA whose modules, and one of whose metadata, have names that a terminal would obey."""
    tensors = {key.replace("mid_block", f"mid_{EVIL}"): tensor for key, tensor in as_kohya(mixed_updates(rank=6)).items()}
    save_file(tensors, path, {"ss_output_name": EVIL})
    return path


def seen(capsys: pytest.CaptureFixture[str]) -> str:
    told = capsys.readouterr()
    assert not FORBIDDEN & set(told.out + told.err)
    return told.out + told.err


@posix
def test_names_are_shown_and_not_obeyed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / f"a{EVIL.replace('/', '')}\nerror: b"
    folder.mkdir()
    source, packed, plain = lora_file(folder / "in.safetensors"), folder / "packed.safetensors", folder / "plain.safetensors"
    bad = folder / "bad.safetensors"
    bad.write_text("no tensors")
    page = folder / "page.html"
    commands = {
        "compress": (["--model", source, "--save_to", packed, "--quantize", "bits=4", "--verbose", "--report", page], 0),
        "expand": (["expand", "--model", packed, "--save_to", plain, "--verbose"], 0),
        "inspect": (["inspect", "--model", source, "--verbose"], 0),
        "compare": (["compare", "--model", source, "--other", packed, "--verbose"], 0),
        "check": (["check", "--model", source], None),
        "refused": (["inspect", "--model", bad], 1),
        "absent": (["inspect", "--model", folder / "absent.safetensors"], 2),
        "flag": (["inspect", f"--{EVIL}"], 2),
    }
    for name, (words, status) in commands.items():
        assert main([str(word) for word in words]) == status or status is None, name
        shown = seen(capsys)
        assert "\nerror: b" not in shown, name
        if name in ("compress", "expand", "inspect", "compare"):
            assert r"\x1b[31m" in shown and "[bold]" in shown and ":hear" in shown, name
    for words in (["inspect", "--model", source, "--json"], ["compare", "--model", source, "--other", packed, "--json"]):
        assert main([str(word) for word in words]) == 0
        text = seen(capsys)
        assert text.isascii() and json.dumps(EVIL)[1:-1] in text and json.loads(text.splitlines()[0])
    assert not FORBIDDEN & set(page.read_text(encoding="utf-8"))


def test_an_inspection_of_a_path_is_json(tmp_path: Path) -> None:
    path = lora_file(tmp_path / "lora.safetensors")
    assert json.loads(json.dumps(inspect_file(path).as_json()))["model"] == str(path)


@posix
def test_a_name_that_is_no_utf8_is_told_as_that(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/lora\xff.safetensors")
    try:
        lora_file(tmp_path / "lora.safetensors").rename(name)
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    assert main(["inspect", "--model", name]) == 1
    assert r"lora\xff.safetensors: the name is not valid UTF-8" in seen(capsys)


def run(*words: object, encoding: str | None = None, output: str | None = None) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command of its own."""
    environment = {**os.environ, **({"PYTHONIOENCODING": encoding} if encoding else {})}
    with open(output or os.devnull, "wb") as file:
        command = [*COMMAND, *map(str, words)]
        done = subprocess.run(
            command, env=environment, stdout=file if output else subprocess.PIPE, stderr=subprocess.PIPE, timeout=300
        )
    return done.returncode, (done.stdout or b"").decode("ascii", "replace"), done.stderr.decode("ascii", "replace")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_stream_without_unicode_gets_escapes(encoding: str, tmp_path: Path) -> None:
    path = lora_file(tmp_path / "キャラ.safetensors")
    status, out, err = run("inspect", "--model", path, "--verbose", encoding=encoding)
    assert status == 0 and "Traceback" not in err
    assert r"\u30ad\u30e3\u30e9.safetensors" in out and "#" in out, "names as escapes, spectra in ASCII"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_behind_standard_output_is_one_line(tmp_path: Path) -> None:
    path = lora_file(tmp_path / "lora.safetensors")
    for words in (["inspect", "--model", path], ["inspect", "--model", path, "--json"], ["--help"]):
        status, _, err = run(*words, output="/dev/full")
        assert (status, err.count("\n")) == (1, 1), err
        assert err.startswith("error: standard output: cannot be written (No space left on device)")


@posix
def test_a_reader_that_leaves_ends_the_command_in_silence(tmp_path: Path) -> None:
    path = lora_file(tmp_path / "lora.safetensors")
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run([*COMMAND, "inspect", "--model", str(path)], stdout=write, stderr=subprocess.PIPE, timeout=300)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


_SLOW = """\
import os, signal, sys, threading, time
from lora_compress.engine import to_file
from lora_compress.cli import main
from lora_compress.files.atomic import atomic_path

def slow(source, target, *_, **__):
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"half")
        print("ready", file=sys.stderr, flush=True)
        time.sleep(120)

to_file.compress_file = slow
sys.exit(main(sys.argv[1:]))
"""


def _heed_interrupts() -> None:
    """Gives the command the handler of a terminal: a suite that runs in the background passes on that SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@posix
@pytest.mark.parametrize(
    ("number", "status", "said"), [(signal.SIGTERM, 143, "ended by SIGTERM"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_removes_what_is_half_written_and_says_so(number: int, status: int, said: str, tmp_path: Path) -> None:
    path = lora_file(tmp_path / "lora.safetensors")
    words = ["--model", str(path), "--save_to", str(tmp_path / "out.safetensors"), "--new_rank", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", _SLOW, *words], env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=_heed_interrupts
    )
    assert process.stderr is not None and process.stderr.readline() == "ready\n"
    process.send_signal(number)
    told = process.stderr.read()
    assert process.wait(timeout=60) == status
    assert told.startswith(f"{said}: no unfinished file") and told.count("\n") == 1
    assert os.listdir(tmp_path) == ["lora.safetensors"]


_STUCK = f"""\
import runpy, sys, time
from lora_compress.engine import decompose

def stuck(updates):
    sys.stderr.write("ready\\n")  # at once: two threads come here
    time.sleep(600)

decompose.by_svd = stuck
runpy.run_path({os.fspath(ROOT / "resize_lora_ext.py")!r}, run_name="__main__")
"""


@posix
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_does_not_wait_for_a_decomposition_that_takes_minutes(number: int, status: int, tmp_path: Path) -> None:
    paths = ["--model", str(lora_file(tmp_path / "lora.safetensors")), "--save_to", str(tmp_path / "out.safetensors")]
    process = subprocess.Popen(
        [sys.executable, "-c", _STUCK, *paths, "--quantize", "bits=4"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_heed_interrupts,
    )
    assert process.stderr is not None and process.stderr.readline().startswith("ready")
    time.sleep(1.0)  # by then the main thread does nothing but wait
    process.send_signal(number)
    assert process.wait(timeout=60) == status
    assert "no unfinished file" in process.stderr.read()
    assert os.listdir(tmp_path) == ["lora.safetensors"]


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="no list of child processes")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_batch_ends_with_its_processes(number: int, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for index in range(40):
        lora_file(tmp_path / "in" / f"{index}.safetensors")
    command = [*COMMAND, "--model", str(tmp_path / "in"), "--save_to", str(tmp_path / "out"), "--new_rank", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=_heed_interrupts)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None and len(children.read_text().split()) < 3:  # one of them is Python's own
        time.sleep(0.05)
    time.sleep(0.5)  # they start, or work: whichever it is
    os.killpg(process.pid, number)
    told = process.communicate(timeout=120)[1]
    if process.returncode == 0:
        pytest.skip("the batch was done before")
    assert process.returncode == 128 + number and "Traceback" not in told and told.count("\n") == 1
    assert not [name for name in os.listdir(tmp_path / "out") if name.startswith(".")] if (tmp_path / "out").is_dir() else True
