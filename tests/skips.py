"""Which tests may be skipped, and the list of those that were, which ends the output of a run.

Where REQUIRE_LISTED_SKIPS=1 is set, as in CI, a skip whose reason is not in ALLOWED fails the run. Elsewhere it is only told.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable

__all__ = ["ALLOWED", "is_allowed", "is_required", "summary"]

# {the beginning of a reason: why no environment of the suite can run the test, or which one does}
ALLOWED = {
    "`bootstrap.py test --all` runs it": "the public workflow does so every night",
    "sd-scripts is absent": "it could not be cloned; REQUIRE_SD_SCRIPTS=1 makes it a failure",
    "the real file ": "files that other people made cannot be part of this repository",
    "no Chromium ": "no browser could be installed; REQUIRE_BROWSER=1 makes it a failure",
    "this torchvision has its operators": "what is repaired elsewhere is whole here",
    "torchao is not in this environment": "tests/consumers/test_diffusers_releases.py runs the test in another environment",
    "diffusers ": "a release of diffusers that lacks the model: the test runs on newer ones",
    "runs the others": "it is part of the run that it starts",
    "the page of this host is not part of the worker": "only some of the programs have that page",
    # programs that are no packages: a checkout of theirs is named by a variable
    "ComfyUI is absent": "the program is no package",
    "a1111 is absent": "the program is no package",
    "forge is absent": "the program is no package",
    "forge_neo is absent": "the program is no package",
    "reforge is absent": "the program is no package",
    "set COMFYUI_DIR to": "the program is no package",
    "set A1111_DIR to": "the program is no package",
    "set FORGE_DIR to": "the program is no package",
    "set FORGE_NEO_DIR to": "the program is no package",
    "set REFORGE_DIR to": "the program is no package",
    "musubi-tuner is absent": "the program is no package",
    "InvokeAI is absent": "its requirements are at odds with ours",
    "this file system takes UTF-8 alone": "names of other bytes cannot be made there",
    "the batch was done before": "the machine was faster than the signal",
}
if sys.platform != "linux":
    ALLOWED |= {
        "/proc is where Linux": "another system",
        "RLIMIT_FSIZE is": "another system",
        "there is no sh": "another system",
        "memory is read from /proc": "another system",
        "measures by /proc": "another system",
        "Windows has no": "another system",
        "SIGKILL is not of Windows": "another system",
        "needs fork": "another system",
        "needs signals": "another system",
        "the trainings are forks": "another system",
        "ray is not installed": "requirements/dev.txt installs it on Linux alone",
        "pip install --no-deps --target": "bootstrap.py makes some of these folders on Linux alone",
    }
if sys.version_info < (3, 11):
    ALLOWED |= {
        "requirements/gui.txt needs": "Gradio needs Python 3.11",
        "pip install --no-deps --target": "what the folder holds needs Python 3.11",
    }


def is_allowed(reason: str) -> bool:
    """Whether a test may be skipped for this reason."""
    return any(reason.startswith(known) for known in ALLOWED)


def is_required() -> bool:
    """Whether any other skip is a failure."""
    return os.environ.get("REQUIRE_LISTED_SKIPS") == "1"


def summary(reasons: Iterable[str]) -> list[str]:
    """Each reason with the number of its tests, the most frequent first; after those on the list the others."""
    counts = Counter(reasons).most_common()
    lines = [f"{count:4d}  {reason}" for reason, count in counts if is_allowed(reason)]
    others = [f"{count:4d}  {reason}" for reason, count in counts if not is_allowed(reason)]
    if others:
        verdict = "REQUIRE_LISTED_SKIPS=1 makes it a failure" if not is_required() else "which fails this run"
        lines += [f"not on the list in tests/skips.py, {verdict}:", *others]
    return lines
