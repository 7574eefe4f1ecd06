"""Bytes against relative error: our codecs beside truncation in usual formats, LoRAQuant's scheme and Shannon's bound.

    python benchmarks/rate_distortion.py [--lora FILE ...] [--plot OUT.svg] [--json OUT.json]

LoRA with singular values falling as 1/i, as i^-0.5 and as exp(-i/8), with 1/i and heavy-tailed factors (Student's t with 4
degrees of freedom), and whatever trained files are given. Ours are whole packed files, header and index counted, and errors are
taken from what is decoded. The others are weights and scales alone: see peers.py. The bytes of the others at an error are the
fewest of their curve that keep it; ours aim at it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_ROOT), str(_ROOT / "benchmarks")]

from curves import write_plot  # noqa: E402
from measure import Goal, goal_table  # noqa: E402
from peers import FORMATS, Point, decomposed, loraquant, shannon, truncated  # noqa: E402

from lora_compress import CompressionSettings, LowRankUpdate, SettingsError, compress, load_lora  # noqa: E402
from lora_compress.update import relative_error, squared_error  # noqa: E402

_SHAPES = ((1280, 1280), (640, 640), (640, 2048))  # (out, in)
_RANK = 64
_ERRORS = (0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5)
_OURS: dict[str, dict[str, Any]] = {
    "entropy": {"strategy": "entropy"},
    "mixed": {"strategy": "mixed"},
    "int8": {"bits": 8},
    "int4": {"bits": 4},
    "int3": {"bits": 3},
    "nf4": {"bits": 4, "strategy": "nf4"},
}
_PEERS = {"fp16": "truncation, fp16", "int8": "truncation + int8", "nf4": "truncation + NF4"}
_LORAQUANT = [(bits, share) for bits in (2, 3) for share in (0.5, 0.8, 0.9, 0.95, 0.99)]
SPECTRA = {
    "1/i": lambda i: 1 / i,
    "i^-0.5": lambda i: i**-0.5,
    "exp(-i/8)": lambda i: torch.exp(-i / 8),
    "1/i, Student-t 4": lambda i: 1 / i,
    "alike": torch.ones_like,
}


def synthetic(kind: str, rank: int = _RANK, shapes: Sequence[tuple[int, int]] = _SHAPES) -> dict[str, LowRankUpdate]:
    """Modules of one spectrum with random factors, Gaussian or Student's t."""
    random = torch.Generator().manual_seed(0)
    falling = SPECTRA[kind](torch.arange(1, rank + 1, dtype=torch.float64)).sqrt()

    def rows(width: int) -> torch.Tensor:
        drawn = torch.randn(rank, width, generator=random, dtype=torch.float64)
        if kind.endswith("Student-t 4"):
            drawn /= torch.randn(4, rank, width, generator=random, dtype=torch.float64).square().mean(0).sqrt()
        return (drawn / drawn.norm(dim=1, keepdim=True) * falling.unsqueeze(1)).float()

    return {
        f"lora_unet_{n}": LowRankUpdate(rows(inputs), rows(outputs).T, float(rank)) for n, (outputs, inputs) in enumerate(shapes)
    }


def ours(updates: Mapping[str, LowRankUpdate], settings: Mapping[str, Any], errors: Iterable[float]) -> list[Point]:
    """Bytes and error of packed files made for each of `errors`; those that cannot be had are left out."""
    points = []
    for error in errors:
        try:
            made = compress(updates, CompressionSettings.parse({**settings, "target_error": error}))
        except SettingsError:
            continue
        pairs = [squared_error(update, made.updates.get(name)) for name, update in updates.items()]
        points.append((float(made.report.bytes[1]), relative_error(sum(lost for lost, _ in pairs), sum(norm for _, norm in pairs))))
    return points


def curves_of(updates: Mapping[str, LowRankUpdate], errors: Sequence[float] = _ERRORS) -> dict[str, list[Point]]:
    """{what: its points}, ours and the others, of one LoRA."""
    modules = decomposed(updates)
    curves = {f"ours: {name}": ours(updates, settings, errors) for name, settings in _OURS.items()}
    curves |= {label: truncated(modules, FORMATS[name]) for name, label in _PEERS.items()}
    return curves | {
        "LoRAQuant": sorted(loraquant(modules, bits, share) for bits, share in _LORAQUANT),
        "Shannon's bound": shannon(modules),
    }


def bytes_at(points: Sequence[Point], error: float) -> float:
    """The fewest bytes that keep an error; infinite where none do."""
    return min((size for size, reached in points if reached <= error), default=math.inf)


def interpolated(points: Sequence[Point], error: float) -> float:
    """Bytes at an error on the straight line, in log error, between the neighbours of a falling curve."""
    ordered = sorted(points)
    for (less, above), (more, below) in itertools.pairwise(ordered):
        if below <= error <= above:
            share = math.log(above / error) / math.log(above / below) if above > below else 1.0
            return less + share * (more - less)
    return bytes_at(points, error)


def goals_of(label: str, curves: Mapping[str, Sequence[Point]]) -> list[Goal]:
    """Section 6: at 5 to 10 % against fp16 and int8, at 15 to 25 % against NF4; the worst of the range."""
    mine = curves["ours: entropy"]
    wanted = {"truncation, fp16": (0.40, (0.05, 0.075, 0.1)), "truncation + int8": (0.65, (0.05, 0.075, 0.1))}
    wanted["truncation + NF4"] = (0.80, (0.15, 0.2, 0.25))
    goals = []
    for peer, (goal, errors) in wanted.items():
        worst = max(bytes_at(mine, error) / interpolated(curves[peer], error) for error in errors)
        goals.append(Goal(f"{label}: entropy / {peer} at {errors[0]:.0%} to {errors[-1]:.0%}", goal, worst))
    return goals


def table(label: str, full: float, curves: Mapping[str, Sequence[Point]], errors: Sequence[float] = _ERRORS) -> str:
    """Kilobytes at each error, a line for each curve."""
    lines = [f"\n{label}: kB at a relative error (fp16 file: {full / 1e3:.0f} kB of weights)"]
    lines.append(f"{'':22}" + "".join(f"{error:>9.1%}" for error in errors))
    for name, points in curves.items():
        found = [bytes_at(points, error) if name.startswith("ours") else interpolated(points, error) for error in errors]
        lines.append(f"{name:22}" + "".join(f"{size / 1e3:9.1f}" if size < math.inf else f"{'-':>9}" for size in found))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", type=Path, nargs="*", default=[], help="trained LoRA files")
    parser.add_argument("--spectra", nargs="*", choices=list(SPECTRA), default=[kind for kind in SPECTRA if kind != "alike"])
    parser.add_argument("--plot", type=Path, help="SVG to write")
    parser.add_argument("--json", type=Path, help="also write all points to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sets = {kind: synthetic(kind) for kind in arguments.spectra}
    sets |= {f"{path.stem} (trained)": load_lora(path).updates for path in arguments.lora}
    found: dict[str, dict[str, list[Point]]] = {}
    sizes: dict[str, float] = {}
    goals: list[Goal] = []
    for label, updates in sets.items():
        found[label] = curves_of(updates)
        sizes[label] = sum(2.0 * update.numel for update in updates.values())
        goals += goals_of(label, found[label])
        print(table(label, sizes[label], found[label]), flush=True)
    print("\n" + goal_table(goals))
    if arguments.plot:
        write_plot(arguments.plot, found, sizes)
    if arguments.json:
        arguments.json.write_text(json.dumps({"fp16": sizes, "curves": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
