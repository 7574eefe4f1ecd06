"""Every error this package raises on purpose: one clear sentence that names the file, the key, what was found and the remedy."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["NOT_FINITE", "EvaluationError", "FormatError", "LoraCompressError", "MissingPackageError", "SaveError", "SettingsError"]

# Of a module from whose update nothing can be computed.
NOT_FINITE = "its factors or its alpha hold NaN or infinity: the training diverged, nothing can be saved from it"


class LoraCompressError(Exception):
    """Base of all errors raised on purpose by LoRA Compress."""


class SettingsError(LoraCompressError, ValueError):
    """One or more settings are unknown, malformed or contradict each other; `problems` lists every one of them."""

    def __init__(self, problems: Sequence[str], where: str = "compression settings") -> None:
        self.problems = tuple(problems)
        super().__init__(f"{where}: " + "; ".join(self.problems))


class FormatError(LoraCompressError, ValueError):
    """A file or tensor is not what its name or its metadata says."""


class MissingPackageError(LoraCompressError, ImportError):
    """A package that is needed for this is not installed."""


class SaveError(LoraCompressError, OSError):
    """A file could not be written; whatever stood under its name before is untouched."""


class EvaluationError(LoraCompressError, ValueError):
    """What is to be measured cannot be: pictures, captions, a base model, weights of a feature extractor."""
