"""A file appears whole or not at all, whatever interrupts its writing, and its size is known beforehand."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from core.factories import mixed_updates, random_update
from safetensors import safe_open
from safetensors.torch import save_file

from lora_compress import CompressionSettings, SaveError, SettingsError, atomic_path, compress, load_lora, save
from lora_compress.files import writer as files
from lora_compress.files.dtypes import TensorSpec
from lora_compress.files.writer import TensorWriter, safetensors_size, write_safetensors

ROOT = Path(__file__).resolve().parents[2]
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, signals and file limits")


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@posix
def test_a_killed_process_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "lora.safetensors"
    target.write_text("old")
    if (child := os.fork()) == 0:
        with atomic_path(target) as temporary:
            temporary.write_text("half of the new")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert target.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2  # it was in the middle of writing


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from core.factories import random_update
from lora_compress import CompressionSettings, compress, load_lora, save
path = Path(sys.argv[1])
settings = CompressionSettings.parse({"bits": 8})
loras = [compress({f"m{i}": random_update(32, 4096, 4096, seed=10 * j + i) for i in range(8)}, settings) for j in (0, 1)]
rng, seen = random.Random(0), 0
for attempt in range(10):
    if (child := os.fork()) == 0:
        for turn in range(10**6):
            save(loras[turn % 2], path)
    time.sleep(rng.uniform(0.002, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if path.exists():
        seen += 1
        found = load_lora(path).updates
        assert any(all(torch.equal(found[n].up, u.up) for n, u in lora.updates.items()) for lora in loras), attempt
print("loaded", seen, "size", path.stat().st_size)
"""


@posix
def test_a_process_killed_while_saving_never_leaves_half_a_file(tmp_path: Path) -> None:
    done = run(KILLED, tmp_path / "lora.safetensors")
    assert done.returncode == 0, done.stderr
    _, seen, _, size = done.stdout.split()
    assert int(seen) >= 5, "the children never came to write"
    assert int(size) > 2e6


FULL_DISK = """
import resource, signal, sys
from core.factories import random_update
from lora_compress import CompressionSettings, SaveError, compress, save
lora = compress({"m": random_update(64, 2048, 2048)}, CompressionSettings.parse({"bits": 8}))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save(lora, sys.argv[1])
except SaveError as error:
    print(error)
"""


@posix
def test_a_full_disk_is_one_clear_error_and_harms_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    old = compress(mixed_updates(), CompressionSettings.parse({"bits": 4}))
    save(old, path)
    before = path.read_bytes()
    done = run(FULL_DISK, path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{path}: cannot be written (")
    assert "free disk space or choose another output folder" in done.stdout
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("where", ["file/lora.safetensors", "file/deeper/lora.safetensors", "folder.safetensors"])
def test_a_path_that_cannot_be_written_is_a_save_error(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(SaveError, match=f"^{tmp_path / where}: cannot be written"):
        save(compress({"m": random_update()}, CompressionSettings.parse({"bits": 8})), tmp_path / where)
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["file", "folder.safetensors"]


def test_a_name_that_would_lie_about_its_content_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"end its name with \.safetensors"):
        save(compress({"m": random_update()}, CompressionSettings()), tmp_path / "lora.ckpt")
    assert not list(tmp_path.iterdir())


def test_a_pair_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    lora = compress({"m": random_update()}, CompressionSettings.parse({"bits": 8, "save_format": "both"}))
    path, partner = tmp_path / "lora.safetensors", tmp_path / "lora.kohya.safetensors"
    path.write_text("old")
    partner.mkdir()  # stands in its way
    with pytest.raises(SaveError, match=f"^{partner}: cannot be written"):
        save(lora, path)
    assert path.read_text() == "old"
    assert sorted(file.name for file in tmp_path.iterdir()) == [partner.name, path.name]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_while_writing_leaves_the_old_file_and_no_other(error: type[BaseException], tmp_path: Path) -> None:
    target = tmp_path / "lora.safetensors"
    target.write_text("old")
    with pytest.raises(error):
        with atomic_path(target) as temporary:
            temporary.write_text("new")
            raise error
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


WRITERS = """
import sys
from core.factories import random_update
from lora_compress import CompressionSettings, compress, save
seed = int(sys.argv[2])
lora = compress({f"m{i}": random_update(16, 512, 512, seed=seed + i) for i in range(4)}, CompressionSettings.parse({"bits": 8}))
print("ready", flush=True)
sys.stdin.readline()
for _ in range(30):
    save(lora, sys.argv[1])
"""


@posix
def test_two_writers_of_one_output_leave_the_whole_file_of_one(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WRITERS, str(path), str(seed)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in (0, 100)
    ]
    for writer in started:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in started:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    seen = set()
    while any(writer.poll() is None for writer in started):
        if path.exists():
            data = path.read_bytes()
            begin = 8 + int.from_bytes(data[:8], "little")
            written = json.loads(data[8:begin])["__metadata__"]["sshs_model_hash"]
            assert hashlib.sha256(data[begin:]).hexdigest() == written
            seen.add(written)
    assert [writer.communicate()[1] for writer in started] == ["", ""]
    assert [writer.returncode for writer in started] == [0, 0]
    assert len(seen) == 2
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_link_under_a_guessable_name_is_not_followed(tmp_path: Path) -> None:
    target, notes = tmp_path / "out.safetensors", tmp_path / "notes.txt"
    notes.write_text("mine")
    (tmp_path / ".out.tmp.safetensors").symlink_to(notes)
    with atomic_path(target) as temporary:
        temporary.write_text("new")
    assert notes.read_text() == "mine"
    assert target.read_text() == "new" and not target.is_symlink()


@posix
def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    target = tmp_path / "out.safetensors"
    if (child := os.fork()) == 0:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = tmp_path.iterdir()
    with atomic_path(target) as first:
        assert not left.exists()
        with atomic_path(target) as second:
            assert first != second and first.exists()
            second.write_text("second")
        first.write_text("first")
    assert target.read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


@posix
def test_permissions_are_those_of_the_umask_or_of_the_file_that_is_replaced(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_path(tmp_path / "new") as temporary:
            temporary.write_text("")
        (tmp_path / "kept").write_text("")
        (tmp_path / "kept").chmod(0o604)
        with atomic_path(tmp_path / "kept") as temporary:
            temporary.write_text("")
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o604


@posix
@pytest.mark.parametrize("kind", ["FIFO", "link to a FIFO", "socket", "device"])
def test_an_output_that_is_no_regular_file_is_refused_and_stays(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "out.safetensors"
    if kind == "device":
        target.symlink_to("/dev/null")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(target))
    else:
        os.mkfifo(tmp_path / "fifo" if "link" in kind else target)
        if "link" in kind:
            target.symlink_to("fifo")
    before = target.lstat().st_ino
    with pytest.raises(SaveError, match=r"is a (FIFO|socket|device): results are written to regular files alone"):
        with atomic_path(target):
            pytest.fail("nothing is to be written")
    assert target.lstat().st_ino == before


@pytest.mark.parametrize("whither", ["file.txt", "nowhere"])
def test_a_link_is_replaced_and_what_it_names_stays(whither: str, tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("mine")
    target = tmp_path / "out.safetensors"
    target.symlink_to(whither)
    with atomic_path(target) as temporary:
        temporary.write_text("new")
    assert not target.is_symlink() and target.read_text() == "new"
    assert (tmp_path / "file.txt").read_text() == "mine" and not (tmp_path / "nowhere").exists()


def test_the_longest_name_that_a_folder_takes_can_be_written(tmp_path: Path) -> None:
    target = tmp_path / ("\u00e9" * 121 + ".safetensors")  # 254 bytes
    with atomic_path(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"


def test_missing_folders_are_made(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a" / "b" / "c.safetensors") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "a" / "b" / "c.safetensors").read_text() == "new"


@pytest.mark.parametrize("metadata", [{}, {"ss_tag": 'quotes " and \\ and\nlines, \u00e9\u65e5 \x01', "b": ""}], ids=str)
@pytest.mark.parametrize("values", [{"bits": 8}, {"bits": 4, "strategy": "nf4"}, {"save_format": "fp8"}, {}], ids=str)
def test_bytes_are_those_of_safetensors_own_writer(values: dict[str, object], metadata: dict[str, str], tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    tensors = compress(mixed_updates(), CompressionSettings.parse(values), torch.bfloat16).tensors
    for count in range(1, len(tensors) + 1):  # the header is padded to 8 bytes: different lengths of it
        some = dict(list(tensors.items())[-count:])
        write_safetensors(some, ours, metadata)
        with safe_open(ours, "pt") as file:
            save_file(some, theirs, file.metadata())
        assert ours.stat().st_size == theirs.stat().st_size
        assert safetensors_size({key: TensorSpec.of(tensor) for key, tensor in some.items()}, metadata) == ours.stat().st_size
        data = 8 + int.from_bytes(ours.read_bytes()[:8], "little")
        assert ours.read_bytes()[data:] == theirs.read_bytes()[data:]


@pytest.mark.parametrize("order", ["as in the file", "backwards", "shuffled"])
def test_the_hash_taken_on_the_way_is_that_of_the_file(order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_SETTLED_AT_A_TIME", 1 << 16)
    monkeypatch.setattr(files, "_HASHED_AT_A_TIME", 1 << 12)
    tensors = {f"t{i:03}": torch.randn(997 + i, generator=torch.Generator().manual_seed(i)) for i in range(200)}
    keys = list(tensors)
    if order != "as in the file":
        keys.sort(reverse=True) if order == "backwards" else random.Random(0).shuffle(keys)
    specs = {key: TensorSpec.of(tensor) for key, tensor in tensors.items()}
    path = tmp_path / "x.safetensors"
    with TensorWriter(path, specs, {}) as writer:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda key: writer.write(key, tensors[key]), keys))
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    with safe_open(path, "pt") as file:
        assert file.metadata()["sshs_model_hash"] == hashlib.sha256(data[begin:]).hexdigest()
        assert all(torch.equal(file.get_tensor(key), tensor) for key, tensor in tensors.items())


def test_what_waits_in_a_buffer_is_hashed_as_it_was_written(tmp_path: Path) -> None:
    tensors = {key: torch.full((2,), float(number + 1)) for number, key in enumerate("abc")}
    path = tmp_path / "x.safetensors"
    with TensorWriter(path, {key: TensorSpec.of(tensor) for key, tensor in tensors.items()}, {}) as writer:
        for key, tensor in tensors.items():
            writer.write(key, tensor)
            writer._hash()
    data = path.read_bytes()
    with safe_open(path, "pt") as file:
        assert file.metadata()["sshs_model_hash"] == hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


def test_a_file_that_is_cut_short_while_it_is_written_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(OSError, match="cut it short"), TensorWriter(path, {"a": TensorSpec(torch.float32, (9,))}, {}) as writer:
        writer.write("a", torch.ones(9))
        writer._file.flush()
        os.truncate(path, 20)


def test_a_tensor_that_was_not_announced_or_never_comes_is_an_error(tmp_path: Path) -> None:
    specs = {"a": TensorSpec(torch.float32, (2,)), "b": TensorSpec(torch.float32, (2,))}
    with pytest.raises(ValueError, match="a: announced as"), TensorWriter(tmp_path / "x", specs, {}) as writer:
        writer.write("a", torch.zeros(3))
    with pytest.raises(ValueError, match="never written: b"), TensorWriter(tmp_path / "x", specs, {}) as writer:
        writer.write("a", torch.zeros(2))


def test_loading_does_not_keep_the_file_from_being_replaced(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    first = compress({"m": random_update(seed=1)}, CompressionSettings.parse({"bits": 8}))
    second = compress({"m": random_update(seed=2)}, CompressionSettings.parse({"bits": 8}))
    save(first, path)
    loaded = load_lora(path)
    save(second, path)
    assert torch.equal(loaded.updates["m"].up, first.updates["m"].up)
    assert torch.equal(load_lora(path).updates["m"].up, second.updates["m"].up)
