"""Serves the page until it is interrupted; nothing that was uploaded or made outlives it. Importing this needs Gradio."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..cli.arguments import UsageError
from .page import LOOK, build

__all__ = ["serve"]

_PRIVATE = {"share": False, "ssr_mode": False, "footer_links": [], "enable_monitoring": False, "mcp_server": False, "pwa": False}


def serve(host: str, port: int, max_size: int, open_browser: bool) -> None:
    """Serve the page at http://host:port until SIGINT or SIGTERM.

    Args:
        max_size: bytes of an upload at most.

    Raises:
        UsageError: the port is taken, or the host is no address of this machine.
    """
    with _own_folder():
        page = build()
        try:
            _, address, _ = page.queue(default_concurrency_limit=1).launch(
                server_name=host,
                server_port=port,
                max_file_size=max_size,
                inbrowser=open_browser,
                prevent_thread_lock=True,
                quiet=True,
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
            print("ended")
        finally:
            page.close(verbose=False)


@contextmanager
def _own_folder() -> Iterator[None]:
    """Gradio keeps uploads and downloads in a folder that is removed in the end."""
    with tempfile.TemporaryDirectory(prefix="lora-compress-gui-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        yield
