"""Builds the plug-ins of other programs as folders that need nothing of this repository: python tools/build_integrations.py OUT

Each folder of integrations/ is copied with the core inside it under a private name, because its host may have a package of the
core's name, in another version. The core imports itself relatively alone, so its files stay as they are; in the plug-in's own
files `from lora_compress...` becomes relative.
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

__all__ = ["VENDORED", "build"]

ROOT = Path(__file__).resolve().parents[1]
NAMES = {"comfyui": "ComfyUI-lora-compress", "a1111": "sd-webui-lora-compress"}  # folder of integrations/: that of the plug-in
_PACKAGES = {"a1111": "lora_compress_webui"}  # where the core goes: the host imports scripts of its own by their path alone
VENDORED = "_lora_compress"
_OUR_IMPORT = re.compile(r"^(\s*from )lora_compress\b", re.MULTILINE)


def build(integration: str, target: Path) -> Path:
    """Write the plug-in into a folder in `target`, in the place of what was there; returns the folder."""
    folder = target / NAMES[integration]
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(ROOT / "integrations" / integration, folder, ignore=shutil.ignore_patterns("__pycache__"))
    package = folder / _PACKAGES.get(integration, "")
    for file in package.glob("*.py"):
        file.write_text(_OUR_IMPORT.sub(rf"\1.{VENDORED}", file.read_text(encoding="utf-8")), encoding="utf-8")
    shutil.copytree(ROOT / "lora_compress", package / VENDORED, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "LICENSE", folder)
    return folder


def main() -> None:
    """Build all of them."""
    parser = argparse.ArgumentParser(description="Build the plug-ins of other programs as self-contained folders.")
    parser.add_argument("target", type=Path, metavar="OUT", help="folder that they are written into, such as dist")
    args = parser.parse_args()
    for integration in NAMES:
        print(build(integration, args.target))


if __name__ == "__main__":
    main()
