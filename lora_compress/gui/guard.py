"""Who may use the page: requests to its own address, from its own address, and no more bytes than there is room for.

Any page that a browser shows can send requests to this machine. Two things give such a request away: its `Origin` is not the
address that it asks for, or it asks for a name that is not ours, which an attacker has bent to this machine (DNS rebinding).
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

__all__ = ["Guard", "Limits", "address_allows", "refusal"]

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_EVERYWHERE = ("0.0.0.0", "::")
_READING = ("GET", "HEAD", "OPTIONS")
_AROUND = 1 << 20  # bytes of a request beside the file in it, and of every other request

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]


@dataclass(frozen=True)
class Limits:
    """Bytes of a file that is uploaded, and of all files that are kept, at most."""

    upload: int
    total: int


def address_allows(listening: str, host: str) -> bool:
    """Whether a page that listens at `listening` answers to the name or address `host`.

    It answers to the names of this machine itself and to the one that it was given. Where it listens at all addresses, to every
    numeric one too: no foreign page can have a number as its name.
    """
    if host in (*_LOOPBACK, listening.strip("[]").lower()):
        return True
    if listening not in _EVERYWHERE:
        return False
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host == socket.gethostname().lower()
    return True


def refusal(listening: str, method: str, headers: dict[str, str]) -> str | None:
    """Why a request is not for the page, or None if it is.

    Args:
        listening: --host.
        method: of the request, GET for a websocket.
        headers: by names in small letters.
    """
    own = _split(headers.get("host", ""))
    if own is None or not address_allows(listening, own[0]):
        return "this is no address of the page: open the one that it printed when it started"
    source = headers.get("origin") or (headers.get("referer") if method not in _READING else None)
    if source is not None:
        scheme, _, rest = source.partition("://")
        if scheme not in ("http", "https") or _split(rest.partition("/")[0]) != own:
            return "another page sent this request: use the page itself"
    site, navigates = headers.get("sec-fetch-site", "none"), headers.get("sec-fetch-mode") == "navigate"
    if site not in ("none", "same-origin") and not (navigates and method == "GET"):
        return "another page sent this request: use the page itself"
    return None


def _split(netloc: str) -> tuple[str, int | None] | None:
    """The host, in small letters and without brackets, and the port of `host:port`; None where it is malformed."""
    try:
        parts = urlsplit(f"//{netloc}")
        if not parts.hostname or parts.netloc != netloc or "@" in netloc:
            return None
        return parts.hostname.rstrip(".").lower(), parts.port
    except ValueError:
        return None


class Guard:
    """An ASGI middleware that lets through what `refusal` does not refuse and `limits` have room for.

    Args:
        app: what answers the others.
        listening: --host.
        limits: of uploads.
        folder: with all files that are kept.
    """

    def __init__(self, app: Application, listening: str, limits: Limits, folder: Path) -> None:
        self._app, self._listening, self._limits, self._folder = app, listening, limits, folder
        self._coming = 0  # bytes of uploads under way

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        method = scope.get("method", "GET")
        if (why := refusal(self._listening, method, headers)) is not None:
            await _answer(scope, send, 403, why)
        elif "/file=http" in scope["path"].replace("%3A", ":").lower():
            await _answer(scope, send, 403, "the page fetches nothing from elsewhere")
        elif method in _READING:
            await self._app(scope, receive, send)
        else:
            await self._take(scope, receive, send, headers)

    async def _take(self, scope: Message, receive: Receive, send: Send, headers: dict[str, str]) -> None:
        """Let a request with a body through if there is room for it."""
        length = headers.get("content-length", "0" if "transfer-encoding" not in headers else "")
        if not (length.isascii() and length.isdigit()):
            await _answer(scope, send, 411, "the request does not say how long it is")
            return
        size, upload = int(length), scope["path"].endswith("/upload")
        if size > (self._limits.upload if upload else 0) + _AROUND:
            await _answer(scope, send, 413, f"a file may have {self._limits.upload} bytes at most (--max_size)")
        elif upload and self._coming + size + _bytes_in(self._folder) > self._limits.total + _AROUND:
            told = (
                f"the files of the page may have {self._limits.total} bytes at most (--max_total), and others are kept: try later"
            )
            await _answer(scope, send, 413, told)
        else:
            self._coming += size if upload else 0
            try:
                await self._app(scope, receive, send)
            finally:
                self._coming -= size if upload else 0


def _bytes_in(folder: Path) -> int:
    """Bytes of all files in a folder and the folders in it; files may go while they are counted."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:
                continue
    return total


async def _answer(scope: Message, send: Send, status: int, text: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": text[:120]})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
