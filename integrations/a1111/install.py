"""What the host runs before its start: the entropy coder of packed files, where it is not there yet."""

import launch

if not launch.is_installed("constriction"):
    launch.run_pip("install constriction", "constriction, for LoRA Compress")
