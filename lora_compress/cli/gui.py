"""`resize_lora_ext.py gui`: a page in the browser for those who use no shell."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

from ..gui.guard import Limits
from ..settings.budget import parse_size
from .arguments import Parser, UsageError
from .console import say

__all__ = ["run"]

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}


def run(argv: Sequence[str]) -> int:
    """Serve the page until it is interrupted; see `main` for the exit status."""
    parser = Parser(
        prog="resize_lora_ext.py gui",
        description="A page in the browser: drop a LoRA file, see what it is and what smaller files would lose, choose a size, "
        "download. The files stay on this machine and are removed afterwards.",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen at; default 127.0.0.1, this machine"
    )
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="default 7860")
    parser.add_argument("--max_size", default="2GB", metavar="SIZE", help="of an uploaded file at most; default 2GB")
    parser.add_argument(
        "--max_total", default="10GB", metavar="SIZE", help="of all files that are kept, for an hour each; default 10GB"
    )
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    args = parser.parse(argv)
    if not 1 <= args.port <= 65535:
        raise UsageError(f"--port {args.port}: must lie in 1 to 65535")
    limits = Limits(*(_size(f"--{name}", getattr(args, name)) for name in ("max_size", "max_total")))
    if limits.total < limits.upload:
        raise UsageError(f"--max_total {args.max_total}: is less than one file may have, --max_size {args.max_size}")
    if importlib.util.find_spec("gradio") is None:
        raise UsageError('gui: the page needs Gradio, which is not installed: pip install "gradio>=6.31,<7"')
    os.environ.update(_QUIET)  # Gradio reads them when it is imported
    _go_around_proxies()
    if args.host not in _LOOPBACK:
        say(f"note: --host {args.host}: whoever reaches this machine over the network can use the page")
    from ..gui.server import serve

    serve(args.host, args.port, limits, args.open)
    return 0


def _size(flag: str, text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise UsageError(f"{flag} {text}: {error}") from None


def _go_around_proxies() -> None:
    """Gradio asks its own page whether it is there, which a proxy would not find."""
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost"]))
