"""What pruning alone, quantization alone and the two in cascade save of a LoRA at equal error.

    python benchmarks/cascade.py --lora FILE [FILE ...] [--bits 8 6 5 4 3] [--json OUT.json]

The error is that of quantization alone, all components kept, at each width; then the others are asked for the same error.
Whole files are compared, and errors are taken from what is read back.

    quantization  dynamic integers of that width in groups of 64, all components
    pruning       ranks over the whole file by singular value, factors in float16
    cascade       pruning, then quantization, chosen together: the smallest of integers of any width, mixed and entropy coding

Entropy coding counts as a cascade, because components that are not worth their bits are left out. What it saves without that
(though components that round to zero still go) is told beside it. Savings are bytes of the input less bytes of the file.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_ROOT), str(_ROOT / "benchmarks")]

from measure import Goal, goal_table  # noqa: E402
from peers import Point  # noqa: E402

from lora_compress import CompressionSettings, LowRankUpdate, SettingsError, load_lora, thin_svd  # noqa: E402
from lora_compress.engine.to_file import compress_file  # noqa: E402
from lora_compress.inspection.comparison import compare_files  # noqa: E402
from lora_compress.quantization.entropy.codec import decode_entropy, encode_entropy  # noqa: E402
from lora_compress.update import difference, relative_error  # noqa: E402

_GOAL = 1.15
_WIDTHS = (8, 6, 5, 4, 3)
_TURNS = 7  # at finding a step: the error is nearly proportional to it
_CODECS: dict[str, dict[str, Any]] = {f"int{bits}": {"bits": bits} for bits in _WIDTHS}
_CODECS |= {"mixed": {"strategy": "mixed"}, "entropy": {"strategy": "entropy"}}


def written(source: Path, settings: Mapping[str, Any]) -> Point | None:
    """Bytes and error of the file that settings give; None if they cannot be met."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "out.safetensors"
        try:
            report = compress_file(source, target, CompressionSettings.parse(settings))
        except SettingsError:
            return None
        if report.status != "written":
            return None
        return float(report.bytes[1]), compare_files(str(source), str(target)).relative_error


def entropy_alone(updates: Mapping[str, LowRankUpdate], error: float) -> float:
    """Bytes of payload at the coarsest step that keeps an error, no component left out but those that round to zero."""
    modules = []
    for update in updates.values():
        spectrum = thin_svd(update)
        modules.append((*spectrum.balanced(len(spectrum.sigma)), float(spectrum.sigma.square().sum())))
    norm = sum(module[2] for module in modules)

    def at(step: float) -> Point:
        size, lost = 0, 0.0
        for down, up, whole in modules:
            coded = encode_entropy(down, up, step)
            size += sum(map(len, coded.chunks))
            rows = decode_entropy(coded.chunks, coded.rank, down.shape[1], up.shape[1], step)
            kept = list(coded.kept)
            left = [i for i in range(len(down)) if i not in coded.kept]
            lost += difference(down[kept + left], up[kept + left], *rows) if coded.rank else whole
        return float(size), relative_error(lost, norm)

    step, best = error * (norm / sum(update.numel for update in updates.values())) ** 0.5, float("inf")
    for _ in range(_TURNS):
        size, reached = at(step)
        best = min(best, size) if reached <= error else best
        step *= min(max(0.998 * error / reached, 0.1), 10.0)
    return best


def lines_of(source: Path, widths: Sequence[int]) -> list[dict[str, Any]]:
    """A line for each width: the error of quantization alone, and what each way takes at it."""
    size, updates = source.stat().st_size, load_lora(source).updates
    lines = []
    for bits in widths:
        quantized = written(source, {"bits": bits})
        if quantized is None:
            continue
        error = quantized[1]
        pruned = written(source, {"target_error": error})
        cascades = {name: written(source, {**settings, "target_error": error}) for name, settings in _CODECS.items()}
        found = {name: point[0] for name, point in cascades.items() if point is not None and point[1] <= error}
        best = min(found, key=found.__getitem__)
        fixed = min((found[name] for name in found if name.startswith("int")), default=None)
        lines.append(
            {
                "bits": bits,
                "error": error,
                "input": size,
                "quantization": quantized[0],
                "pruning": pruned[0] if pruned else None,
                "cascade": found[best],
                "cascade_codec": best,
                "cascade_of_integers": fixed,
                "entropy_alone": entropy_alone(updates, error),
            }
        )
    return lines


def goals_of(label: str, lines: Sequence[Mapping[str, Any]]) -> list[Goal]:
    """Bytes that the cascade saves against the better of the two alone."""
    goals = []
    for line in lines:
        alone = min(size for size in (line["quantization"], line["pruning"]) if size is not None)
        saved = (line["input"] - line["cascade"]) / max(line["input"] - alone, 1)
        goals.append(Goal(f"{label}: saved by the cascade / alone, at {line['error']:.1%}", _GOAL, saved, at_least=True))
    return goals


def table(label: str, lines: Sequence[Mapping[str, Any]]) -> str:
    """Kilobytes at each error."""
    columns = ("quantization", "pruning", "cascade", "cascade_of_integers", "entropy_alone")
    rows = [
        f"\n{label}: {lines[0]['input'] / 1e3:.0f} kB; kB at equal error",
        f"{'error':>8}" + "".join(f"{c:>21}" for c in columns),
    ]
    for line in lines:
        sizes = [line[column] for column in columns]
        told = "".join(f"{size / 1e3:21.1f}" if size is not None else f"{'-':>21}" for size in sizes)
        rows.append(f"{line['error']:8.2%}{told}   {line['cascade_codec']}")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", type=Path, nargs="+", required=True, help="trained LoRA files, in float16")
    parser.add_argument("--bits", type=int, nargs="+", choices=_WIDTHS, default=list(_WIDTHS))
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {path.stem: lines_of(path, arguments.bits) for path in arguments.lora}
    goals: list[Goal] = []
    for label, lines in found.items():
        print(table(label, lines))
        goals += goals_of(label, lines)
    print("\n" + goal_table(goals))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
