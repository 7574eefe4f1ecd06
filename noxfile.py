"""Our loaders on other releases of diffusers, each in an environment of its own: pip install nox && nox

0.32.1, 0.35.2, 0.38.0 and 0.42.1 are also part of `python bootstrap.py test --all`.
"""

from __future__ import annotations

import nox

RELEASES = {  # what is installed for each
    "0.32.1": ("-c", "requirements/constraints.txt", "diffusers", "transformers", "peft"),
    "0.35.2": ("diffusers==0.35.2", "transformers==4.57.1", "peft==0.17.1", "huggingface-hub==0.35.3"),
    "0.38.0": ("diffusers==0.38.0", "transformers==4.57.1", "peft==0.17.1", "huggingface-hub==0.36.2"),
    "0.42.1": ("-r", "requirements/diffusers-0.42.txt"),
}
FILES = ("tests/consumers/test_diffusers.py", "tests/consumers/test_matrix.py", "tests/consumers/test_diffusers_families.py")
CHOSEN = "layer or swapped or weighed or flux or naive"


@nox.session
@nox.parametrize("diffusers", list(RELEASES))
def loaders(session: nox.Session, diffusers: str) -> None:
    """The tests of load_lora and of plain files, on one release."""
    packages = ("accelerate", "hypothesis", "pillow", "pytest", "toml", "torchvision")
    session.install("-e", ".", *RELEASES[diffusers], *packages)
    session.run("python", "-m", "pytest", "-q", *FILES, "-k", CHOSEN, *session.posargs, env={"HF_HUB_OFFLINE": "1"})
