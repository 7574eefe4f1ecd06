"""Our loaders on other releases of diffusers, each in an environment of its own: pip install nox && nox

0.32.1 and 0.42.1 are also part of `python bootstrap.py test`.
"""

from __future__ import annotations

import nox

RELEASES = {  # and what goes with them
    "0.32.1": ("transformers==4.54.1", "peft==0.17.1", "huggingface-hub==0.34.3"),
    "0.35.2": ("transformers==4.57.1", "peft==0.17.1", "huggingface-hub==0.35.3"),
    "0.42.1": ("transformers==5.24.0", "peft==0.21.2", "huggingface-hub==2.4.0"),
}
FILES = ("tests/consumers/test_diffusers.py", "tests/consumers/test_matrix.py")
CHOSEN = "layer or swapped or weighed or flux or naive"


@nox.session
@nox.parametrize("diffusers", list(RELEASES))
def loaders(session: nox.Session, diffusers: str) -> None:
    """The tests of load_lora and of plain files, on one release."""
    packages = ("accelerate", "hypothesis", "pillow", "pytest", "toml", "torchvision")
    session.install("-e", ".", f"diffusers=={diffusers}", *RELEASES[diffusers], *packages)
    session.run("python", "-m", "pytest", "-q", *FILES, "-k", CHOSEN, *session.posargs, env={"HF_HUB_OFFLINE": "1"})
