"""LoRA on quantized base models of diffusers: what load_lora does on each, against the dequantized base; prints a table.

    PYTHONPATH=.:tests python tests/consumers/quantized.py [BASE...]

The layers are those of the libraries themselves, put into the model as diffusers' integrations of them do, on the CPU.
"""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from consumers.pipelines import added, flux, flux_output, linear_updates, sd_output, tiny_sd
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_compress import CompressionSettings, as_kohya, compress_file, load_lora
from lora_compress import diffusers as ours

__all__ = ["BASES", "Outcome", "missing", "outcome"]

_WAYS: dict[str, dict[str, object]] = {"packed": {"bits": 4}, "fp8": {"save_format": "fp8"}}


@dataclass(frozen=True)
class Base:
    """A way to quantize a base model.

    Args:
        title: in the table.
        package: that it needs.
        quantize: makes the linear layers of a model quantized, in place.
        dequantized: the weight that such a layer stands for.
        tolerance: of the outputs, relative.
        models: that are measured on it.
    """

    title: str
    package: str
    quantize: Callable[[nn.Module], None]
    dequantized: Callable[[Any], Tensor]
    tolerance: float = 1e-5
    models: tuple[str, ...] = ("SD", "FLUX")


@dataclass(frozen=True)
class Outcome:
    """Relative differences of outputs from those of the dequantized base: with the LoRA, with another, and after removal.

    `change` is what the LoRA itself does to the output, beside which they are small. `fused` is the difference after fuse_lora, or
    what PEFT says to it.
    """

    loaded: float
    swapped: float
    removed: float
    change: float
    fused: float | str


def missing(base: str) -> str | None:
    """The package that a base needs and that is not installed."""
    package = BASES[base].package
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return package
    return None


def outcome(base: str, model: str, way: str, folder: Path) -> Outcome:
    """Load, swap, remove and fuse LoRA of one format on one model."""
    how = BASES[base]
    make, output, component = _MODELS[model]
    pipe = make()
    network = getattr(pipe, component)
    updates = linear_updates(pipe), linear_updates(pipe, 900)
    files = [_written(folder / f"{number}.safetensors", u, way) for number, u in enumerate(updates)]
    how.quantize(network)
    plain = make()
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear):
            plain_layer = getattr(plain, component).get_submodule(name)
            plain_layer.weight.data = how.dequantized(layer).to(plain_layer.weight.dtype)
    expected = [added(plain, load_lora(file).updates, lambda: output(plain)) for file in files]
    base_output = output(plain)
    ours.load_lora(pipe, files[0], "one")
    loaded = output(pipe)
    ours.load_lora(pipe, files[1], "two")
    pipe.set_adapters("two")
    swapped = output(pipe)
    pipe.delete_adapters("one")
    pipe.unload_lora_weights()
    removed = output(pipe)
    ours.load_lora(pipe, files[0], "one")
    try:
        pipe.fuse_lora()
        fused: float | str = _apart(output(pipe), expected[0])
    except (RuntimeError, ValueError, NotImplementedError, TypeError, AttributeError) as error:
        fused = f"{type(error).__name__}: {error}"
    return Outcome(
        _apart(loaded, expected[0]),
        _apart(swapped, expected[1]),
        _apart(removed, base_output),
        _apart(expected[0], base_output),
        fused,
    )


def _apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _written(path: Path, updates: Any, way: str) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in as_kohya(updates).items()}, path)
    target = path.with_stem(f"{path.stem}-{way}")
    precision = None if way == "fp8" else torch.float32
    compress_file(path, target, CompressionSettings.parse({**_WAYS[way], "allow_larger": True}), save_dtype=precision)
    return target


_MODELS: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensor], str]] = {
    "SD": (tiny_sd, sd_output, "unet"),
    "FLUX": (flux, flux_output, "transformer"),
}


# -- the libraries ------------------------------------------------------------------------------------------------------


def _linear(network: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    for module in list(network.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear:
                yield module, name, layer


def _bitsandbytes8(network: Any) -> None:
    import bitsandbytes as bnb

    for parent, name, layer in _linear(network):
        new = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
        new.bias = layer.bias
        setattr(parent, name, new.to("cpu"))
    network.is_loaded_in_8bit = True


def _bitsandbytes4(network: Any) -> None:
    import bitsandbytes as bnb

    for parent, name, layer in _linear(network):
        new = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=torch.float32, quant_type="nf4"
        )
        new.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        new.bias = layer.bias
        setattr(parent, name, new.to("cpu"))
    network.is_loaded_in_4bit = True


def _bitsandbytes8_weight(layer: Any) -> Tensor:
    scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return layer.weight.data.float() * scale[:, None] / 127.0


def _bitsandbytes4_weight(layer: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def _quanto(network: nn.Module) -> None:
    from optimum.quanto import freeze, qint8, quantize

    quantize(network, weights=qint8, exclude=[name for name, m in network.named_modules() if not isinstance(m, nn.Linear)])
    freeze(network)


def _torchao(network: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(network, Int8WeightOnlyConfig())


def _gguf(network: nn.Module) -> None:
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q8_0
    for parent, name, layer in _linear(network):
        if layer.in_features % 32:  # of a block
            continue
        new = GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=torch.float32)
        codes = torch.from_numpy(gguf.quants.quantize(layer.weight.detach().numpy(), kind))
        new.weight = GGUFParameter(codes, quant_type=kind)
        new.bias = layer.bias
        setattr(parent, name, new)


def _gguf_weight(layer: Any) -> Tensor:
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    return layer.weight.data if type(layer) is nn.Linear else dequantize_gguf_tensor(layer.weight).as_subclass(Tensor)


def _by_itself(layer: Any) -> Tensor:
    return layer.weight.dequantize() if hasattr(layer.weight, "dequantize") else layer.weight.data


BASES: dict[str, Base] = {
    "none": Base("not quantized", "torch", lambda network: None, lambda layer: layer.weight.data),
    "bnb8": Base("bitsandbytes, 8 bit", "bitsandbytes", _bitsandbytes8, _bitsandbytes8_weight),
    "bnb4": Base("bitsandbytes, 4 bit", "bitsandbytes", _bitsandbytes4, _bitsandbytes4_weight),
    "quanto": Base("Quanto, int8", "optimum-quanto", _quanto, _by_itself),
    "torchao": Base("torchao, int8", "torchao", _torchao, _by_itself),
    "gguf": Base("GGUF, Q8_0", "gguf", _gguf, _gguf_weight, models=("FLUX",)),  # as diffusers loads it
}


def _cell(value: float | str) -> str:
    return f"{value:.1e}" if isinstance(value, float) else value.partition("\n")[0][:60]


def main() -> None:
    """Print the table, of the bases that are named or of all."""
    from library.compress_torchvision import declare_missing_operators

    declare_missing_operators()
    warnings.simplefilter("ignore")
    versions = (f"{name} {importlib.metadata.version(name)}" for name in ("diffusers", "peft", "torch"))
    print(f"{', '.join(versions)}\n")
    print("| base | package | model | file | loaded | swapped | removed | fused |\n|---|---|---|---|---|---|---|---|")
    for name in sys.argv[1:] or BASES:
        base = BASES[name]
        for model in base.models:
            for way in _WAYS:
                if missing(name):
                    print(f"| {base.title} | {base.package} is not installed | {model} | {way} | | | | |")
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    found = outcome(name, model, way, Path(folder))
                cells = " | ".join(map(_cell, (found.loaded, found.swapped, found.removed, found.fused)))
                print(f"| {base.title} | {importlib.metadata.version(base.package)} | {model} | {way} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
