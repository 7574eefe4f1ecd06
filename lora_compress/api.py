"""The whole of LoRA Compress in a few functions, under the names and with the arguments that lora-scripts' users know."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .engine.in_memory import CompressedLora, compress, save
from .engine.to_file import compress_file
from .errors import FormatError
from .layouts import as_kohya, from_kohya
from .report import CompressionReport
from .report.file_report import FileReport
from .settings import CompressionSettings
from .sources.load import load_lora

if TYPE_CHECKING:
    from .evaluation.results import Evaluation

__all__ = [
    "apply_quantization",
    "combined_compression",
    "evaluate_lora_performance",
    "load_compressed_lora",
    "prune_lora_rank",
    "quantize_lora_weights",
    "save_compressed_lora",
]

PathLike = str | os.PathLike[str]


def quantize_lora_weights(
    lora_weights: Mapping[str, Tensor], bits: float | None = 8, strategy: str = "dynamic", **settings: Any
) -> CompressedLora:
    """Quantize a LoRA that is in memory.

    Each module's update dW = (alpha / r) up @ down is turned into the balanced basis sqrt(sigma_i) u_i, sqrt(sigma_i) v_i of
    its singular value decomposition and its rows are coded; `quantization/grids.py` has the formulas of the strategies.

    Example:
        >>> from safetensors.torch import load_file
        >>> lora = quantize_lora_weights(load_file("lora.safetensors"), bits=4)
        >>> report = save_compressed_lora(lora, "small.safetensors")
        >>> report.bytes[1] < report.bytes[0] / 3
        True

    Args:
        lora_weights: kohya's tensors: <module>.lora_down.weight (r, in, *kernel), .lora_up.weight (out, r, ...), .alpha ().
        bits: per stored weight: 2, 3, 4, 5, 6 or 8; an average for strategies mixed and entropy, None with a target.
        strategy: dynamic (scale from the data), static (step = scale x RMS), nf4 (QLoRA, arXiv 2305.14314), mixed (bits per
            component), entropy (one step, entropy-coded).
        settings: any other setting by name, such as rank_ratio, group_size, target_size.

    Raises:
        FormatError: the tensors are no LoRA in kohya's layout, or hold NaN or infinity.
        SettingsError: settings that do not exist or contradict each other.
    """
    updates, others = from_kohya(lora_weights)
    if not updates or others:
        strange = f", such as {next(iter(others))}" if others else ""
        raise FormatError(f"lora_weights: {len(updates)} modules and {len(others)} tensors that belong to none{strange}")
    return compress(updates, CompressionSettings.parse({**_given(bits=bits), "strategy": strategy, **settings}))


def prune_lora_rank(
    lora_path: PathLike, output_path: PathLike, rank_ratio: float = 0.5, norm_threshold: float = 0.0, **settings: Any
) -> FileReport:
    """Keep the strongest components of a LoRA file: `rank_ratio` of all of them, and none under `norm_threshold`.

    By Eckart and Young the k strongest components of a module are its best update of rank k; `pruning.select_ranks` says how
    ranks are chosen over the whole file.

    Args:
        lora_path: a LoRA file of any layout, or a folder that PEFT wrote.
        output_path: a file, which ends with .safetensors, or a folder where the input has an adapter_config.json; the layout stays,
            so every program that loaded the input loads it.
        rank_ratio: components kept / all components of the file, in (0, 1].
        norm_threshold: effective singular value, alpha / r included, below which a component goes.
        settings: any other setting by name, such as min_rank, new_rank, dynamic_method, target_error; and `alpha` or
            `peft_config` of a file that does not tell its scale, as `compress_file` takes them.

    Returns:
        What became of the file; status not_smaller, and nothing written, if it would not have shrunk.

    Raises:
        FormatError, SettingsError, SaveError: as `compress_file`.
    """
    return _compress(lora_path, output_path, rank_ratio=rank_ratio, norm_threshold=norm_threshold, **settings)


def apply_quantization(
    lora_path: PathLike, output_path: PathLike, bits: float | None = 4, strategy: str = "dynamic", **settings: Any
) -> FileReport:
    """Store a LoRA file in few bits, all components kept.

    Arguments as in `quantize_lora_weights`, the rest as in `prune_lora_rank`.
    """
    return _compress(lora_path, output_path, **_given(bits=bits), strategy=strategy, **settings)


def combined_compression(
    lora_path: PathLike,
    output_path: PathLike,
    rank_ratio: float = 0.5,
    norm_threshold: float = 0.0,
    bits: float | None = 4,
    strategy: str = "dynamic",
    evaluate: bool | Mapping[str, Any] = False,
    **settings: Any,
) -> FileReport:
    """Prune, then quantize, save, and evaluate what was written if asked to.

        combined_compression("lora.safetensors", "small.safetensors", 0.5, bits=4, evaluate={"base_model": "sd15/"}).metrics

    Args:
        lora_path: as in `prune_lora_rank`, the following too.
        output_path: of the file to write.
        rank_ratio: components kept / all.
        norm_threshold: effective singular value below which a component goes.
        bits: as in `quantize_lora_weights`.
        strategy: of quantization.
        evaluate: True for sizes and the error of the weights; or the arguments of `evaluate_lora_performance`, such as
            {"base_model": ..., "dataset": ...}. The result is in the report's `evaluation` and `metrics`.
        settings: any other setting by name.

    Raises:
        FormatError, SettingsError, SaveError: as `compress_file`.
        EvaluationError: as `evaluate_lora_performance`; the compressed file has been written by then.
    """
    values = {"rank_ratio": rank_ratio, "norm_threshold": norm_threshold, **_given(bits=bits), "strategy": strategy}
    report = _compress(lora_path, output_path, **values, **settings)
    if evaluate is False or report.output is None:
        return report
    options = {} if evaluate is True else dict(evaluate)
    return replace(report, evaluation=evaluate_lora_performance(report.output, original=lora_path, **options))


def evaluate_lora_performance(lora_path: PathLike, dataset: PathLike | None = None, **options: Any) -> Evaluation:
    """What a LoRA weighs, and what it lost: see `evaluation.performance.evaluate_lora_performance`, which this is.

    found = evaluate_lora_performance("small.safetensors", "photos/", base_model="sd15/", original="lora.safetensors")
    found["size_mb"], found["fid"], found["fid_full"], found["relative_output_error"]
    """
    from .evaluation.performance import evaluate_lora_performance as evaluate  # which needs Pillow, and diffusers to draw

    return evaluate(lora_path, dataset, **options)


def save_compressed_lora(lora: CompressedLora, output_path: PathLike, dtype: torch.dtype | None = None) -> CompressionReport:
    """Write what `quantize_lora_weights` made; with save_format=both a plain file of `dtype` beside it.

    Raises:
        SaveError: the file cannot be written; what was there before is unchanged.
    """
    return save(lora, output_path, dtype)


def load_compressed_lora(lora_path: PathLike, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """A LoRA file, packed or plain, as kohya's tensors, for anything that takes a state dict (diffusers' load_lora_weights).

    Args:
        lora_path: a file of any layout.
        dtype: of the factors: <module>.lora_down.weight (r, in, *kernel), .lora_up.weight (out, r, ...); alphas are float32 ().

    Raises:
        FormatError: the file cannot be read.
    """
    file = load_lora(lora_path, dtype)
    return as_kohya(file.updates) | file.others


def _compress(
    lora_path: PathLike,
    output_path: PathLike,
    *,
    alpha: float | None = None,
    peft_config: PathLike | None = None,
    **settings: Any,
) -> FileReport:
    return compress_file(lora_path, output_path, CompressionSettings.parse(settings), alpha=alpha, peft_config=peft_config)


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
