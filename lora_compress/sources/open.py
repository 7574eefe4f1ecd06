"""Opening a file as a source: a LoRA in any key layout, a packed one, or a folder that PEFT wrote."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import FormatError
from ..files.tensors import open_tensors
from ..layouts.foreign import CARRIED
from ..layouts.identity import what_it_holds
from ..layouts.left_over import refuse_left_over
from ..layouts.peft_folder import weights_of
from ..layouts.quantized import dequantized
from ..layouts.registry import LAYOUTS
from ..layouts.source import PlainFile
from ..layouts.survey import Stated, Survey
from ..packed.file import PackedFile, is_packed
from .base import LoraSource

__all__ = ["open_lora", "require_readable"]


def open_lora(
    path: str | os.PathLike[str],
    repair: bool = False,
    *,
    alpha: float | None = None,
    peft_config: str | os.PathLike[str] | None = None,
) -> LoraSource:
    """Open a LoRA file of any layout, without reading its weights.

    Example:
        >>> with open_lora("lora.safetensors") as source:
        ...     name = next(iter(source))
        ...     print(source.layout, source.family, source[name].rank)
        kohya sdxl 8

    Args:
        path: .safetensors, or .pt, .ckpt, .bin and their like, which are read as weights alone. Of a packed file the first
            bytes will do. A folder that PEFT wrote stands for the weights in it.
        repair: mend what can be mended (ranks that disagree, odd alphas, half modules) and say so in `notes`.
        alpha: of modules whose alpha the file does not tell, where that is not their rank.
        peft_config: adapter_config.json of the file, or a folder with it; by default the one beside a file named adapter_model.

    Raises:
        SettingsError: alpha is 0 or no finite number.
        FormatError: no such file, no LoRA, or something is wrong with it that was not to be repaired.
    """
    path = weights_of(path)
    stated = Stated(alpha, peft_config)
    if is_packed(path):
        return PackedFile(path)
    file, scaled, unknown_scales = dequantized(open_tensors(path))
    survey = Survey(file, repair, unknown_scales, stated)
    for key in scaled:
        survey.tell("factors that another program had quantized were multiplied by their scales", key)
    for layout in LAYOUTS:
        layout.find(survey)
    refuse_left_over(survey)
    survey.finish()
    if not survey.modules:
        reasons = "; ".join(["it is " + what_it_holds(file), *survey.notes()]).replace(CARRIED, "")
        raise FormatError(f"{file.path}: holds no low-rank update that is known here: {reasons}: give a LoRA")
    return PlainFile(file, survey)


def require_readable(written: Path, target: str | os.PathLike[str], modules: int) -> None:
    """Open a plain file that was written under a temporary name, before it takes its own; its header and alphas alone are read.

    Args:
        written: the file.
        target: the name that it is about to take, for messages.
        modules: how many updates it was written with.

    Raises:
        FormatError: it cannot be read as a LoRA of that many modules, as when a packed file names the keys of its modules wrongly.
    """
    try:
        with open_lora(written) as source:
            found = len(source)
        problem = "" if found == modules else f"{found} modules are found in it, {modules} were written"
    except FormatError as error:
        problem = str(error).replace(str(written), "the result")
    if problem:
        raise FormatError(
            f"{target}: was not written, because it could not be read again ({problem}): "
            "the names of keys in the input do not fit their tensors: get the input again"
        )
