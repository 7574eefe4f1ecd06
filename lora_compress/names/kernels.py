"""Kernel sizes of flattened convolutions, from what the layer is called."""

from __future__ import annotations

import re

__all__ = ["unflatten"]

_THREE = re.compile(
    r"(resnets[._]\d+[._]conv[12]|(down|up)samplers[._]0[._]conv|in_layers[._]2|out_layers[._]3"
    r"|(input|output)_blocks[._]\d+[._]\d+[._](op|conv)|\bconv_in|\bconv_out)$"
)
_ONE = re.compile(r"(conv_shortcut|skip_connection)$")


def unflatten(name: str, columns: int) -> tuple[int, tuple[int, ...]]:
    """Channels and kernel of a U-Net layer whose update was stored as (out, columns), columns = channels * kernel.

    LoHa, LoKr and LyCORIS leave the kernel out and take it from the model; the names of a U-Net's convolutions say it as well.
    What has another name is a linear layer, to which a 1x1 convolution is the same for every program that reads matrices.
    """
    if _THREE.search(name) and columns % 9 == 0:
        return columns // 9, (3, 3)
    return columns, (1, 1) if _ONE.search(name) else ()
