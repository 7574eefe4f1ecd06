"""`resize_lora_ext.py gui`: what it refuses, what it offers for a file, and the whole page in a browser."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import pytest
from core.factories import dense_error, mixed_updates
from report.conftest import absent
from safetensors.torch import save_file

from lora_compress import CompressionSettings, FormatError, LoraCompressError, as_kohya, load_lora
from lora_compress.cli.main import main
from lora_compress.engine.to_file import compress_file
from lora_compress.gui.offers import PACKED, PLAIN, SETTINGS, about, chart_rows, curves, size_range
from lora_compress.gui.work import make, told_error
from lora_compress.inspection.file import inspect_file

ROOT = Path(__file__).resolve().parents[2]
OVERLAY = Path(os.environ.get("GUI_OVERLAY") or ROOT / ".gui")
COMMAND = [sys.executable, str(ROOT / "resize_lora_ext.py"), "gui"]
ASKED = 12_000  # bytes, as drive_gui.py asks


def write_lora(folder: Path) -> Path:
    path = folder / "lora.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in as_kohya(mixed_updates(rank=16)).items()}, path)
    return path


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prot", "1"], "--prot: unknown flag, did you mean --port?"),
        (["--port", "70000"], "--port 70000: must lie in 1 to 65535"),
        (["--port", "high"], "--port: invalid int value"),
        (["--max_total", "1GB"], "--max_total 1GB: is less than one file may have, --max_size 2GB"),
        (["--max_size", "much"], "--max_size much: must be a size such as 20MB"),
        (["lora.safetensors"], "lora.safetensors: belongs to no flag"),
        ([], 'Gradio, which is not installed: pip install "gradio>=6.31,<7"'),
    ],
)
def test_wrong_flags_and_a_missing_gradio_are_one_line(
    flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["gui", *flags]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ") and told.err.count("\n") == 1 and not told.out
    assert message in told.err


def test_the_sizes_on_offer_are_smaller_than_the_file_and_can_be_had(tmp_path: Path) -> None:
    path = write_lora(tmp_path)
    found = inspect_file(str(path))
    for kind, curve in curves(found).items():
        offer = size_range(curve, found.bytes)
        assert 0 < offer.smallest < offer.usual < offer.largest < found.bytes / 1e6
        assert offer.largest > (found.bytes - 2 * 1e6 * offer.step) / 1e6
        for size in (offer.smallest, offer.usual, offer.largest):
            made = make(str(path), kind, size, tmp_path, lambda done, total: None)
            assert made.file is not None and made.file.stat().st_size <= round(size * 1e6)
            if size == offer.usual:
                assert 0.02 < dense_error(mixed_updates(rank=16), dict(load_lora(made.file).updates)) < 0.08


def test_the_chart_has_a_falling_line_for_each_kind(tmp_path: Path) -> None:
    found = inspect_file(str(write_lora(tmp_path)))
    rows = chart_rows(curves(found), found.bytes)
    for kind in (PLAIN, PACKED):
        errors = [error for _, error, name in rows if name == kind]
        assert len(errors) > 4 and errors == sorted(errors, reverse=True)
    assert all(0 < size < found.bytes / 1e6 and 0 < error < 100 for size, error, _ in rows)
    best = {kind: min(error for size, error, name in rows if name == kind and size < 0.01) for kind in (PLAIN, PACKED)}
    assert best[PACKED] < best[PLAIN] / 4


def test_the_line_of_packed_files_is_that_of_the_report(tmp_path: Path) -> None:
    path, settings = write_lora(tmp_path), CompressionSettings.parse({**SETTINGS[PACKED], "target_size": "10kB"})
    told = compress_file(path, tmp_path / "out.safetensors", settings).curve
    shown = curves(inspect_file(str(path)))[PACKED]
    assert [error for _, error in shown] == [error for _, error in told]
    assert len({a - b for (a, _), (b, _) in zip(shown, told, strict=True)}) <= 2, "they differ by what is no factor, and rounding"


def test_a_file_that_cannot_get_smaller_is_told_in_a_sentence(tmp_path: Path) -> None:
    packed = make(str(write_lora(tmp_path)), PACKED, 0.01, tmp_path, lambda done, total: None).file
    assert packed is not None
    (tmp_path / "out").mkdir()
    made = make(str(packed), PLAIN, 1.0, tmp_path / "out", lambda done, total: None)
    assert made.sentence.startswith("Nothing was written: the result would take ") and (made.file, made.report) == (None, None)
    assert not list((tmp_path / "out").iterdir())


def test_names_of_the_page_stand_for_temporary_paths(tmp_path: Path) -> None:
    path = write_lora(tmp_path)
    made = make(str(path), PLAIN, 0.02, tmp_path, lambda done, total: None)
    assert made.report is not None and str(tmp_path) not in made.report.read_text(encoding="utf-8")
    for bad, message in (
        ("wrong.safetensors", "no safetensors file"),
        ("lora.ckpt", "is no .safetensors file"),
        ("gone.safetensors", "up"),
    ):
        if not bad.startswith("gone"):
            (tmp_path / bad).write_text("no tensors here" * 20)
        with pytest.raises(FormatError) as caught:
            make(str(tmp_path / bad), PLAIN, 0.02, tmp_path, lambda done, total: None)
        told = told_error(caught.value, str(tmp_path / bad), tmp_path)
        assert told.startswith(f"{bad}: ") and message in told and str(tmp_path) not in told
    assert told_error(LoraCompressError(f"{tmp_path / 'out.safetensors'}: full"), str(path), tmp_path) == "out.safetensors: full"


def test_what_a_file_says_of_itself_is_no_html(tmp_path: Path) -> None:
    path = tmp_path / "<b>x.safetensors"
    write_lora(tmp_path).rename(path)
    text = about(inspect_file(str(path)))
    assert "&lt;b&gt;x.safetensors" in text and "<b>" not in text and str(tmp_path) not in text
    assert all(word in text for word in ("sdxl", "kohya", "float32", "48.6 kB"))


def need_gradio() -> None:
    if sys.version_info < (3, 11):
        pytest.skip("requirements/gui.txt needs Python 3.11")
    if not (OVERLAY / "gradio").is_dir():
        absent(f"pip install --no-deps --target {OVERLAY} -r requirements/gui.txt has not been run")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Address of the page, and the folder for its temporary files."""
    need_gradio()
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(OVERLAY), "TMPDIR": str(temporary), "TEMP": str(temporary)}
    environment |= dict.fromkeys(
        ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy"), "http://127.0.0.1:9"
    )  # nobody is there
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "log"
    with log.open("w") as output:
        command = [*COMMAND, "--port", str(port), "--max_size", "2MB"]
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + 120
        while "open http" not in log.read_text() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.2)
        assert f"open http://127.0.0.1:{port}/ in a browser" in log.read_text(), log.read_text()
        yield f"http://127.0.0.1:{port}/", temporary
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    assert "Traceback" not in log.read_text(), log.read_text()
    if os.name != "nt":
        assert log.read_text().endswith("ended\n") and process.returncode == 0
        assert not list(temporary.glob("lora-compress*")), "uploads and results outlive the page"


def test_the_server_takes_no_larger_upload_whatever_the_page_says(served: tuple[str, Path]) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.safetensors"\r\n\r\n'
    for size, status in ((1_000_000, 200), (3_000_000, 413)):
        asked = Request(f"{served[0]}gradio_api/upload", data=head + bytes(size) + b"\r\n--x--\r\n")
        asked.add_header("Content-Type", "multipart/form-data; boundary=x")
        try:
            found = build_opener(ProxyHandler({})).open(asked, timeout=60).status
        except HTTPError as error:
            found = error.code
        assert found == status


def test_the_server_answers_its_own_page_alone(served: tuple[str, Path]) -> None:
    address, temporary = served
    host = address.split("/")[2]
    cases: list[tuple[str, dict[str, str], int]] = [
        ("", {}, 200),
        ("config", {}, 200),
        ("", {"Host": "evil.example"}, 403),
        ("config", {"Host": f"evil.example:{host.split(':')[1]}"}, 403),
        ("config", {"Origin": "http://evil.example"}, 403),
        ("config", {"Origin": f"http://{host}"}, 200),
        ("gradio_api/file=/etc/passwd", {}, 403),
        ("gradio_api/file=http://127.0.0.1:1/", {}, 403),
        ("gradio_api/file=../../../../etc/passwd", {}, 403),
        (f"gradio_api/file={temporary}/../log", {}, 403),
        (f"gradio_api/file={ROOT / 'README.md'}", {}, 403),
    ]
    for path, headers, status in cases:
        try:
            found = build_opener(ProxyHandler({})).open(Request(address + path, headers=headers), timeout=60).status
        except HTTPError as error:
            found = error.code
        assert found == status, (path, headers)


def test_a_port_that_is_taken_is_one_line(tmp_path: Path) -> None:
    need_gradio()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        environment = os.environ | {"PYTHONPATH": str(OVERLAY), "TMPDIR": str(tmp_path)}
        done = subprocess.run([*COMMAND, "--port", str(port)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith(f"error: --port {port}: is taken") and done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("lora-compress*"))


def test_the_page_in_a_browser(browser: str, served: tuple[str, Path], tmp_path: Path) -> None:
    address, temporary = served
    original = write_lora(tmp_path)
    (tmp_path / "wrong.safetensors").write_text("no tensors here\n" * 20)
    (tmp_path / "large.safetensors").write_bytes(bytes(3_000_000))
    command = [sys.executable, str(Path(__file__).with_name("drive_gui.py")), browser, address, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(OVERLAY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    seen = json.loads(done.stdout)
    assert seen["console"] == [] and seen["hosts"] == ["127.0.0.1"]
    for name, least in (("desktop", 900), ("phone", 250)):
        page = seen[name]
        assert all(word in page["about"] for word in ("lora.safetensors", "sdxl", "kohya", "48.6 kB"))
        assert page["chart"][0] > least and page["chart"][1] > 150 and page["lines"] == 2
        assert page["range"][0] < ASKED / 1e6 < page["range"][1] < original.stat().st_size / 1e6
        assert page["result"].startswith("48.6 kB became ") and "relative error of 0." in page["result"]
        assert page["overflow"] <= 0
    refused = seen["desktop"]
    assert [text.split("\n")[-1].split(" that begins")[0] for text in refused["errors"]] == [
        "wrong.safetensors: no safetensors file, it is a text file"
    ]
    assert "Traceback" not in refused["page of the error"] and not refused["left of the file before"]
    packed = tmp_path / "downloads" / refused["file"]
    assert packed.stat().st_size <= ASKED
    loaded = load_lora(packed)
    assert loaded.packed
    assert dense_error(mixed_updates(rank=16), dict(loaded.updates)) < 0.01
    report = (tmp_path / "downloads" / refused["report"]).read_text(encoding="utf-8")
    assert "lora.safetensors" in report and str(temporary) not in report
