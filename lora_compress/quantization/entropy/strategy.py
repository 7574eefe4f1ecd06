"""Strategy entropy: one quantizer step size for the whole file, integers coded at their probability."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import FormatError
from ..fake import FakeQuantizer
from ..plan import ModulePlan
from ..strategy import BudgetSearch, CodedRows, Decoder, Options, StoredModule, Strategy, whole_number
from .codec import components_told, decode_entropy, encode_entropy, predict_entropy
from .fake import CODEC_NAME, EntropyFakeQuantizer
from .stages import SINGLE, Stages

__all__ = ["ENTROPY"]

_MOST_BITS = 8.0
_STAGES_PER_PLANE = {0: 1, 8_000: 2, 40_000: 4}  # by weights of a module: every chunk costs some bytes
_PHASES_PER_SLOPE = 4  # a phase of 8, one octave of the step size, changes the error by a factor of 4


class _EntropyDecoder(Decoder):
    """Reads payloads with the parameters step (the step size) and layers, and per_plane and phase where layers > 1."""

    def decode(self, module: StoredModule, chunks: Sequence[bytes], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the rows, as `Decoder.decode`."""
        step_size, stages = _number(module.parameters["step"]), _stages_of(module.parameters)
        with np.errstate(over="ignore"):
            down, up = decode_entropy(chunks, module.rank, module.inputs, module.outputs, step_size, stages, dtype)
        if not all(math.isfinite(edge) for rows in (down, up) if rows.numel() for edge in torch.aminmax(rows)):
            raise FormatError(f"step {step_size} makes weights beyond {dtype}: the file is damaged, or decode to float32")
        return down, up

    def decoded_rank(self, module: StoredModule, chunks: Sequence[bytes]) -> int:
        """Return the number of components that have started in these stages, at least one."""
        return max(components_told(chunks, module.rank, _stages_of(module.parameters)), 1)

    def stage_slope(self, module: StoredModule, stage: int) -> float:
        """Return log2 of the least fall of squared error per bit in a stage."""
        phase = whole_number(module.parameters.get("phase", 0))
        return _stages_of(module.parameters).slope(stage) + phase / _PHASES_PER_SLOPE


class _Entropy(Strategy):
    name = "entropy"
    search = BudgetSearch.STEP_SIZE
    allowed_bits = "an average above 0 and up to 8, or none with a target"
    needs_bits = False
    ungrouped = "one step size for the whole file"
    defaults: Mapping[str, Any] = {"progressive": False, "refine": True}
    package = "constriction"
    decoders: Mapping[str, Decoder] = {CODEC_NAME: _EntropyDecoder()}

    def allows(self, bits: float) -> bool:
        """Return whether bits can be an average."""
        return 0.0 < bits <= _MOST_BITS

    def codec_name(self, options: Options) -> str:
        """Return the one codec name of this strategy."""
        return CODEC_NAME

    def encode(self, down: Tensor, up: Tensor, plan: ModulePlan, options: Options, *, predict: bool = False) -> CodedRows:
        """Quantize by the step size of the plan and code the integers, as `Strategy.encode`.

        Raises:
            ValueError: the plan has no step size.
        """
        if plan.step_size is None:
            raise ValueError("strategy entropy needs the step size of a module's plan")
        stages = _stages(down.numel() + up.numel(), plan.planes) if options.progressive else SINGLE
        with np.errstate(over="ignore"):  # values that are too large for the step size are refused
            if predict:
                coded = predict_entropy(down, up, plan.step_size, stages=stages)
            else:
                coded = encode_entropy(down, up, plan.step_size, stages=stages, refine=options.refine)
        parameters: dict[str, Any] = {"step": plan.step_size, "layers": stages.number}
        if stages.number > 1:
            parameters |= {"per_plane": stages.per_plane, "phase": plan.phase}
        return CodedRows(CODEC_NAME, coded.rank, parameters, coded.chunks, coded.rows, coded.kept)

    def fake_quantizer(self, options: Options) -> FakeQuantizer:
        """Return a quantizer for training that keeps to the average bits."""
        return EntropyFakeQuantizer(float(options.bits or 0.0))


def _stages(weights: int, planes: int) -> Stages:
    per_plane = next(number for least, number in reversed(_STAGES_PER_PLANE.items()) if weights >= least)
    return Stages(planes * per_plane, per_plane)


def _stages_of(parameters: Mapping[str, Any]) -> Stages:
    count = whole_number(parameters["layers"])
    return SINGLE if count == 1 else Stages(count, whole_number(parameters["per_plane"]))


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"{value!r} is no float")
    return float(value)


ENTROPY = _Entropy()
