"""Requests that the page does not answer, and what it leaves behind: nothing."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_compress.gui.folder import own_folder
from lora_compress.gui.guard import Guard, Limits, refusal

OWN = "127.0.0.1:7860"


@pytest.mark.parametrize(
    ("listening", "host", "answers"),
    [
        ("127.0.0.1", OWN, True),
        ("127.0.0.1", "localhost:7860", True),
        ("127.0.0.1", "LOCALHOST", True),
        ("127.0.0.1", "[::1]:7860", True),
        ("::1", "[::1]:7860", True),
        ("127.0.0.1", "evil.example:7860", False),
        ("127.0.0.1", "127.0.0.1.evil.example", False),
        ("127.0.0.1", "localhost@evil.example", False),
        ("127.0.0.1", "localhost/evil", False),
        ("127.0.0.1", "", False),
        ("127.0.0.1", "127.0.0.1:x", False),
        ("127.0.0.1", "192.168.1.5:7860", False),
        ("192.168.1.5", "192.168.1.5:7860", True),
        ("studio.lan", "Studio.lan:7860", True),
        ("studio.lan", "other.lan:7860", False),
        ("0.0.0.0", "192.168.1.5:7860", True),
        ("::", "[fe80::1]:7860", True),
        ("0.0.0.0", "evil.example:7860", False),
    ],
)
def test_the_page_answers_to_its_own_names(listening: str, host: str, answers: bool) -> None:
    assert (refusal(listening, "GET", {"host": host}) is None) == answers


@pytest.mark.parametrize(
    ("method", "headers", "answers"),
    [
        ("POST", {}, True),
        ("POST", {"origin": f"http://{OWN}"}, True),
        ("POST", {"origin": "http://evil.example"}, False),
        ("GET", {"origin": "http://evil.example"}, False),
        ("POST", {"origin": "null"}, False),
        ("POST", {"origin": "http://127.0.0.1:9999"}, False),
        ("POST", {"origin": "http://localhost:7860"}, False),
        ("POST", {"origin": f"file://{OWN}"}, False),
        ("POST", {"referer": f"http://{OWN}/page?x"}, True),
        ("POST", {"referer": "http://evil.example/"}, False),
        ("GET", {"referer": "http://evil.example/"}, True),
        ("GET", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, True),
        ("GET", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, False),
        ("POST", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, False),
        ("GET", {"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}, True),
    ],
)
def test_other_pages_are_not_answered(method: str, headers: dict[str, str], answers: bool) -> None:
    assert (refusal("127.0.0.1", method, {"host": OWN, **headers}) is None) == answers


class _Behind:
    """An application that notes what reaches it."""

    def __init__(self) -> None:
        self.reached = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.reached += 1


def ask(guard: Guard, kind: str = "http", method: str = "GET", path: str = "/", **headers: str) -> list[dict[str, Any]]:
    """What a guard answers by itself."""
    sent: list[dict[str, Any]] = []
    given = {"host": OWN} | {name.replace("_", "-"): value for name, value in headers.items()}
    scope = {"type": kind, "method": method, "path": path, "headers": [(k.encode(), v.encode()) for k, v in given.items()]}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(guard(scope, None, send))  # type: ignore[arg-type]
    return sent


def test_uploads_have_a_limit_each_and_in_all(tmp_path: Path) -> None:
    behind = _Behind()
    guard = Guard(behind, "127.0.0.1", Limits(3_000_000, 8_000_000), tmp_path)
    upload = {"method": "POST", "path": "/gradio_api/upload"}
    assert ask(guard, **upload, content_length="3000000") == [] and behind.reached == 1
    assert ask(guard, **upload, content_length="5000000")[0]["status"] == 413
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "other.safetensors").write_bytes(bytes(7_000_000))
    assert ask(guard, **upload, content_length="3000000")[0]["status"] == 413
    assert ask(guard, **upload, transfer_encoding="chunked")[0]["status"] == 411
    assert ask(guard, method="POST", path="/gradio_api/queue/join", content_length="3000000")[0]["status"] == 413
    assert behind.reached == 1
    (tmp_path / "kept" / "other.safetensors").unlink()
    assert ask(guard, **upload, content_length="3000000") == [] and behind.reached == 2


def test_nothing_is_fetched_from_elsewhere_and_websockets_are_guarded(tmp_path: Path) -> None:
    behind = _Behind()
    guard = Guard(behind, "127.0.0.1", Limits(1, 1), tmp_path)
    for path in ("/gradio_api/file=http://10.0.0.1/secret", "/gradio_api/file=HTTPS%3A//10.0.0.1/"):
        assert ask(guard, path=path)[0]["status"] == 403
    assert ask(guard, kind="websocket", origin="http://evil.example")[0]["type"] == "websocket.close"
    assert behind.reached == 0
    ask(guard, kind="websocket", origin=f"http://{OWN}")
    ask(guard, path="/gradio_api/file=/tmp/x/lora.safetensors")
    assert behind.reached == 2


def test_folders_of_killed_pages_are_removed_and_those_in_use_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    other = tmp_path / "lora-compress-gui-notes"
    other.write_text("a file of somebody else")
    code = (
        "import os, tempfile; tempfile.tempdir = os.environ['FOLDER']\n"
        "from lora_compress.gui.folder import own_folder\n"
        "with own_folder() as folder:\n"
        "    (folder / 'upload').write_text('x')\n"
        "    os._exit(9)  # as if it had been killed"
    )
    root = str(Path(__file__).resolve().parents[2])
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"FOLDER": str(tmp_path), "PYTHONPATH": root})
    left = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(left) == 1 and (left[0] / "upload").is_file()
    with own_folder() as first:
        assert not left[0].exists()
        with own_folder() as second:
            assert first.is_dir() and second.is_dir() and first != second
        assert first.is_dir() and not second.exists()
    assert [path.name for path in tmp_path.iterdir()] == [other.name]
