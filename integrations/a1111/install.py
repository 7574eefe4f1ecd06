"""What the host runs before its start: installs those packages of requirements.txt that are not there yet."""

import re
from pathlib import Path

import launch

for requirement in Path(__file__).with_name("requirements.txt").read_text(encoding="utf-8").split():
    if not launch.is_installed(re.match(r"[\w-]+", requirement).group()):
        launch.run_pip(f'install "{requirement}"', f"{requirement}, for LoRA Compress")
