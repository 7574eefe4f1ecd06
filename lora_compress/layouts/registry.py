"""The layouts that are read, in the order in which they are tried: endings that say much before those that say little."""

from __future__ import annotations

from .cloneofsimo import CLONEOFSIMO
from .control_lora import CONTROL_LORA
from .diffusers import DIFFUSERS
from .foreign import FOREIGN
from .full import FULL
from .glora import GLORA
from .kohya import KOHYA
from .loha import LOHA
from .lokr import LOKR
from .peft import PEFT
from .peft_methods import PEFT_METHODS
from .survey import Layout

__all__ = ["LAYOUTS"]

LAYOUTS: tuple[Layout, ...] = (
    KOHYA,
    PEFT_METHODS,  # before PEFT: their keys are those of LoRA, and one more
    PEFT,
    DIFFUSERS,
    CLONEOFSIMO,
    LOHA,
    LOKR,
    GLORA,
    FULL,
    FOREIGN,
    CONTROL_LORA,  # its endings, .up and .down, could end the name of a layer
)
