"""Serves the page until it is interrupted; nothing that was uploaded or made outlives it. Importing this needs Gradio."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from typing import Any

from starlette.middleware import Middleware

from ..cli.arguments import UsageError
from .folder import own_folder
from .guard import Guard, Limits
from .page import LOOK, build
from .work import CLOSING, WORKING

__all__ = ["serve"]

_PATIENCE = 30  # seconds for the modules that are worked on when the page ends
_PRIVATE = {"share": False, "ssr_mode": False, "footer_links": [], "enable_monitoring": False, "mcp_server": False, "pwa": False}


def serve(host: str, port: int, limits: Limits, open_browser: bool) -> None:
    """Serve the page at http://host:port until SIGINT or SIGTERM.

    Args:
        limits: of an upload, and of all files that are kept.

    Raises:
        UsageError: the port is taken, or the host is no address of this machine.
    """
    with own_folder() as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(folder / "files")  # where Gradio keeps uploads and downloads
        tempfile.tempdir = str(folder)  # of this process: what is half uploaded or half made goes with the rest
        page = build()
        try:
            _, address, _ = page.queue(default_concurrency_limit=1).launch(
                server_name=host,
                server_port=port,
                max_file_size=limits.upload,
                inbrowser=open_browser,
                prevent_thread_lock=True,
                quiet=True,
                app_kwargs={"middleware": [Middleware(Guard, host, limits, folder)]},
                **LOOK,
                **_PRIVATE,
            )
        except OSError:
            raise UsageError(
                f"--port {port}: is taken, or --host {host} is no address of this machine: choose another one"
            ) from None
        except ValueError:  # Gradio asked for its own page
            raise UsageError(f"--host {host}: does not answer this machine itself: name it in NO_PROXY, or leave it out") from None
        print(f"open {address} in a browser; Ctrl+C ends it", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("ended", flush=True)
        finally:
            _end(page)


def _end(page: Any) -> None:
    """Close the page and stop what it works on, so that nothing is written to its folder any more; further signals do not count."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    CLOSING.set()
    page.close(verbose=False)
    WORKING.acquire(timeout=_PATIENCE)
