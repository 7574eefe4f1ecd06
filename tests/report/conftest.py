"""The browser that pages are looked at in."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
HEADLESS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--dump-dom"]


def absent(why: str) -> None:
    """Skip the test, or fail it where REQUIRE_BROWSER is set."""
    if os.environ.get("REQUIRE_BROWSER"):
        pytest.fail(why)
    pytest.skip(f"{why} (REQUIRE_BROWSER=1 makes this a failure)")


@pytest.fixture(scope="session")
def browser() -> str:
    """Path of a Chromium that starts here."""
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    starts = found and subprocess.run([found, *HEADLESS, "about:blank"], capture_output=True, timeout=120).returncode == 0
    if not starts:
        absent(f"no Chromium that starts: {found} does not" if found else "no Chromium on the path: apt-get install chromium")
    assert found is not None
    return found
