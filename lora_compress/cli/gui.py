"""`resize_lora_ext.py gui`: a page in the browser for those who use no shell."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence

from ..settings.budget import parse_size
from .arguments import Parser, UsageError

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
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    args = parser.parse(argv)
    if not 1 <= args.port <= 65535:
        raise UsageError(f"--port {args.port}: must lie in 1 to 65535")
    try:
        max_size = parse_size(args.max_size)
    except ValueError as error:
        raise UsageError(f"--max_size {args.max_size}: {error}") from None
    if importlib.util.find_spec("gradio") is None:
        raise UsageError('gui: the page needs Gradio, which is not installed: pip install "lora-compress[gui]"')
    os.environ.update(_QUIET)  # Gradio reads them when it is imported
    _go_around_proxies()
    if args.host not in _LOOPBACK:
        print(f"note: --host {args.host}: whoever reaches this machine over the network can use the page", file=sys.stderr)
    from ..gui.server import serve

    serve(args.host, args.port, max_size, args.open)
    return 0


def _go_around_proxies() -> None:
    """Gradio asks its own page whether it is there, which a proxy would not find."""
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost"]))
