"""Programs that load LoRA: what each of them needs, ignores and refuses, as data."""
