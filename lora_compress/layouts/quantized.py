"""Factors that another program stored in 8 bits with a scale beside them, read as the numbers that they stand for."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..files.dtypes import TensorSpec
from ..files.tensors import TensorFile

__all__ = ["QUANTIZED", "UnknownScale", "dequantized"]

QUANTIZED = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)

# What else is quantized, such as weights of the base model, is carried through.
_FACTOR = re.compile(r"lora|lokr_|hada_|\.diff$|\.[ab][12]\.weight$|[._](down|up)(\.weight)?$")

# Keys beside a factor KEY = STEM.weight. The first are multiplied: ComfyUI's names (comfy/ops.py; `weight_scale` and, in its older
# files, `scale_weight`), and KEY.scale of converters of LoRA. The second belong to what goes into a layer, and not to its weight.
_MULTIPLIED = ("{key}_scale", "{key}.scale", "{key}.weight_scale", "{key}.scale_weight", "{stem}.scale_weight", "{stem}.scale")
_OF_INPUTS = ("{stem}.input_scale", "{stem}.scale_input", "{key}.input_scale", "{key}.scale_input")
_FORMAT = "{stem}.comfy_quant"  # JSON as bytes
_PLAIN_FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")
_MARKER = "scaled_fp8"  # says of a whole file that it has such scales


@dataclass(frozen=True)
class UnknownScale:
    """Why a quantized factor cannot be read: what is wrong under which key, and all keys that belong to the factor."""

    key: str
    found: str
    beside: tuple[str, ...]


@dataclass(frozen=True)
class _Scale:
    key: str
    shape: tuple[int, ...]  # in which it is multiplied
    beside: tuple[str, ...]


def dequantized(file: TensorFile) -> tuple[TensorFile, list[str], dict[str, UnknownScale]]:
    """The file with its quantized factors as float32 and without their scales; their keys; and factors whose scale is not known.

    A factor is int8 or fp8 and has a key beside it; fp8 without any is a precision like others.
    """
    scales: dict[str, _Scale] = {}
    unknown: dict[str, UnknownScale] = {}
    ordered = sorted(file)
    for key, info in file.items():
        exact = info.dtype.is_floating_point and info.dtype not in QUANTIZED
        beside = () if exact or len(info.shape) < 2 or not _FACTOR.search(key) else tuple(dict.fromkeys(_beside(key, ordered)))
        if beside:
            found = _scale(file, key, beside)
            if isinstance(found, _Scale):
                scales[key] = found
            else:
                unknown[key] = found
    return (_Dequantized(file, scales) if scales else file), list(scales), unknown


def _stem(key: str) -> str:
    return key.removesuffix(".weight")


def _beside(key: str, ordered: list[str]) -> Iterator[str]:
    """Keys that begin with that of a factor, or with all of it but its last part."""
    stem = _stem(key)
    for prefix in (f"{key}.", f"{key}_scale", f"{key}_zero") if stem == key else (f"{stem}.",):
        for other in ordered[bisect_left(ordered, prefix) :]:
            if not other.startswith(prefix):
                break
            if other != key and not other.endswith((".bias", ".alpha")):
                yield other


def _scale(file: TensorFile, key: str, beside: tuple[str, ...]) -> _Scale | UnknownScale:
    def names(patterns: tuple[str, ...]) -> list[str]:
        return list(dict.fromkeys(name for p in patterns if (name := p.format(key=key, stem=_stem(key))) in beside))

    multiplied, [*formats] = names(_MULTIPLIED), names((_FORMAT,))
    strange = [other for other in beside if other not in (*multiplied, *names(_OF_INPUTS), *formats)]
    if strange:
        return UnknownScale(strange[0], "belongs to a quantized factor in a way that is not known here", beside)
    if len(multiplied) != 1:
        return UnknownScale((multiplied or beside)[0], f"is one of {len(multiplied)} scales of a quantized factor", beside)
    for name in formats:
        if problem := _format_problem(file, name):
            return UnknownScale(name, problem, beside)
    scale, dtype = multiplied[0], file[key].dtype
    if dtype not in QUANTIZED:
        return UnknownScale(scale, f"scales a factor of {_name(dtype)}, whose meaning is not known here", beside)
    info = file[scale]
    shape = _multiplied_as(info.shape, file[key].shape)
    if shape is None or info.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        found = f"is {_name(info.dtype)} of the shape {info.shape} and scales a factor of the shape {file[key].shape}"
        return UnknownScale(scale, found, beside)
    return _Scale(scale, shape, beside)


def _multiplied_as(scale: tuple[int, ...], factor: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape in which a scale is multiplied: one number, one for each row, or one for each row and column; None for blocks."""
    if all(size == 1 for size in scale):
        return (1,) * len(factor)
    if len(scale) == 1:
        return (scale[0], *(1,) * (len(factor) - 1)) if scale[0] == factor[0] else None
    fits = len(scale) <= len(factor) and all(one in (1, other) for one, other in zip(scale, factor, strict=False))
    return (*scale, *(1,) * (len(factor) - len(scale))) if fits else None


def _format_problem(file: TensorFile, key: str) -> str:
    """What is wrong with ComfyUI's description of a quantized layer, "" where its scale is simply multiplied."""
    try:
        text = bytes(file.read(key).flatten().to(torch.uint8).tolist()) if file[key].numel <= 2**16 else b""
        about = json.loads(text)
        parameters = about.get("params") or {}
        kind, rotated = about.get("format"), about.get("convrot") or parameters.get("convrot")
    except (ValueError, AttributeError):
        return "is no description of a quantized layer"
    if kind not in _PLAIN_FORMATS or rotated:
        return f"says that the factor is {json.dumps(kind)}{' and rotated' if rotated else ''}, which is not read here"
    return ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Dequantized(TensorFile):
    """A file seen through its scales: factors are float32, products of what is stored and of the scale."""

    def __init__(self, file: TensorFile, scales: Mapping[str, _Scale]) -> None:
        taken = {key for scale in scales.values() for key in scale.beside} | {_MARKER}
        infos = {key: info for key, info in file.items() if key not in taken}
        infos |= {key: TensorSpec(torch.float32, file[key].shape) for key in scales}
        super().__init__(file.path, infos, self._product, file.metadata, file.close)
        self._file, self._scales = file, scales

    def _product(self, key: str) -> Tensor:
        tensor = self._file.read(key)
        scale = self._scales.get(key)
        if scale is None:
            return tensor
        factor = self._file.read(scale.key).float().reshape(scale.shape)
        if not bool(torch.isfinite(factor).all()):
            raise ValueError(f"its scale {scale.key} holds NaN or infinity")
        return tensor.float() * factor

    def stored_bytes(self, key: str) -> int:
        scale = self._scales.get(key)
        return self._file.stored_bytes(key) + (sum(map(self._file.stored_bytes, scale.beside)) if scale else 0)

    def precision(self, key: str) -> torch.dtype:
        if key not in self._scales:
            return self._file.precision(key)
        stored = self._file[key].dtype
        return torch.float16 if stored == torch.int8 else stored
