"""Why FID of few pictures needs a floor: distances between samples of Gaussians whose true distance is known.

    python benchmarks/fid_bias.py [--widths 2048 128] [--plot docs/images/fid_bias.svg] [--json OUT.json]

Features have eigenvalues 1/i, as wide as Inception's (2048) and as the probe's (128). Two samples of N of the same law, true
distance 0, and two of laws whose means are apart: true distance 0.05 of the trace of the covariance. Everything is in units of
that trace. KID is told by its mean and standard deviation over the repeats, of the same law.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

import torch
from torch import Tensor

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_ROOT), str(_ROOT / "benchmarks")]

from curves import STYLE_SHEET, stroke  # noqa: E402

from lora_compress.evaluation.frechet import frechet_distance, frechet_infinity  # noqa: E402
from lora_compress.evaluation.kernels import kernel_distance  # noqa: E402

TRUE = 0.05  # distance of the laws that differ, of the trace
_COUNTS = (16, 32, 64, 128, 256, 512, 1000, 2000)
_PANEL, _MARGINS, _LEGEND = (430, 300), (58, 16, 30, 44), 44  # left, right, top, bottom
_LINES = {  # name in a row: what the legend says, colour, width, dashes
    "same": ("FID, same law: the floor", "#c2410c", 2.2, ""),
    "apart": ("FID, laws 0.05 apart", "#0b57d0", 2.2, ""),
    "difference": ("the second less the first", "#0f7b6c", 1.6, "6 3"),
    "infinity": ("FID infinity of the second", "#7c3aed", 1.6, "2 3"),
    "true": ("true distance", "#5f6368", 1.2, ""),
}
_LOW, _HIGH = 0.01, 3.0

Row = dict[str, float | None]


def samples(width: int, count: int, seed: int, shift: float = 0.0) -> Tensor:
    """N features (N, d) with eigenvalues 1/i, their trace 1, their mean `shift` from zero in squared length."""
    spread = 1.0 / torch.arange(1, width + 1, dtype=torch.float64)
    spread = (spread / spread.sum()).sqrt()
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(count, width, generator=random, dtype=torch.float64) + math.sqrt(shift)) * spread


def row_of(width: int, count: int, repeats: int) -> Row:
    """What N pictures make of distances 0 and 0.05."""
    pairs = [(samples(width, count, 2 * i), samples(width, count, 2 * i + 1)) for i in range(repeats)]
    shift = (samples(width, 1, 0, TRUE) - samples(width, 1, 0))[0]
    same, apart = [], []
    for first, second in pairs:
        same.append(frechet_distance(first, second))
        gap = first.mean(dim=0) - second.mean(dim=0)  # a shift moves means and nothing else
        apart.append(same[-1] + float((gap - shift).square().sum() - gap.square().sum()))
    kernels = [kernel_distance(*(side * width**0.5 for side in pair)) for pair in pairs]  # of features of unit size
    enough = count >= 4 * width
    return {
        "count": count,
        "same": fmean(same),
        "apart": fmean(apart),
        "difference": fmean(apart) - fmean(same),
        "infinity": fmean(frechet_infinity(first, second + shift) for first, second in pairs[:3]) if enough else None,
        "kid_mean": fmean(kernels),
        "kid_deviation": stdev(kernels) if repeats > 1 else None,
        "true": TRUE,
    }


def rows_of(width: int, counts: Sequence[int] = _COUNTS, budget: int = 2000) -> list[Row]:
    """A row for each N; about `budget` pictures are drawn for each, two repeats at least and twenty at most."""
    return [row_of(width, count, min(max(budget // count, 2), 20)) for count in counts]


def table(width: int, rows: Sequence[Row]) -> str:
    """The rows as text."""
    names = ("count", "same", "apart", "difference", "infinity", "kid_mean", "kid_deviation")
    lines = [f"\nfeatures {width} wide, in units of the trace", "".join(f"{name:>15}" for name in names)]
    lines += ["".join(f"{'-' if row[name] is None else format(row[name], '.4g'):>15}" for name in names) for row in rows]
    return "\n".join(lines)


def write_bias_plot(path: Path, rows: Mapping[int, Sequence[Row]]) -> None:
    """A panel for each width, both axes logarithmic, as an SVG that needs nothing else."""
    width, height = max(_PANEL[0] * len(rows), 2 * _PANEL[0]), _PANEL[1] + _LEGEND
    parts = [f'<rect width="{width}" height="{height}" fill="#fff"/>', *_legend(width)]
    for index, (wide, own) in enumerate(rows.items()):
        parts.append(f'<g transform="translate({index * _PANEL[0]} {_LEGEND})">{"".join(_panel(wide, own))}</g>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">'
    text = f"{head}<title>Bias of FID over the number of pictures</title><style>{STYLE_SHEET}</style>{''.join(parts)}</svg>\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _legend(width: int) -> list[str]:
    parts, x, y = [], 14.0, 18.0
    for label, colour, thick, dashes in _LINES.values():
        wide = 27 + 6.2 * len(label) + 14
        if x + wide > width:
            x, y = 14.0, y + 18
        parts.append(stroke(f"M{x:.0f} {y - 4}h22", colour, thick, dashes) + f'<text x="{x + 27:.0f}" y="{y}">{label}</text>')
        x += wide
    return parts


def _panel(width: int, rows: Sequence[Row]) -> list[str]:
    left, right, top, bottom = _MARGINS
    wide, high = _PANEL[0] - left - right, _PANEL[1] - top - bottom
    counts = [float(row["count"] or 1) for row in rows]

    def place(count: float, value: float) -> tuple[float, float]:
        x = left + wide * math.log(count / counts[0]) / math.log(counts[-1] / counts[0])
        return x, top + high * math.log(_HIGH / min(max(value, _LOW), _HIGH)) / math.log(_HIGH / _LOW)

    parts = [f'<text class="title" x="{left}" y="{top - 10}">features {width} wide</text>']
    for value in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0):
        y = place(counts[0], value)[1]
        parts.append(f'<path class="grid" d="M{left} {y:.1f}h{wide}"/>')
        parts.append(f'<text text-anchor="end" x="{left - 6}" y="{y + 4:.1f}">{value:g}</text>')
    for count in counts:
        x = place(count, 1.0)[0]
        parts.append(f'<path class="grid" d="M{x:.1f} {top}v{high}"/>')
        parts.append(f'<text text-anchor="middle" x="{x:.1f}" y="{top + high + 16}">{count:.0f}</text>')
    parts.append(f'<rect class="frame" x="{left}" y="{top}" width="{wide}" height="{high}"/>')
    for name, (_, colour, thick, dashes) in _LINES.items():
        points = [place(float(row["count"] or 1), value) for row in rows if (value := row[name]) is not None]
        if len(points) > 1:
            parts.append(stroke("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points), colour, thick, dashes))
    axis = f'x="{left + wide / 2}" y="{_PANEL[1] - 10}"'
    parts.append(f'<text class="axis" text-anchor="middle" {axis}>pictures on each side, N</text>')
    turned = f"translate(13 {top + high / 2}) rotate(-90)"
    return [*parts, f'<text class="axis" text-anchor="middle" transform="{turned}">distance / trace of the covariance</text>']


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[2048, 128])
    parser.add_argument("--counts", type=int, nargs="+", default=list(_COUNTS))
    parser.add_argument("--plot", type=Path, help="SVG to write")
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")
    arguments = parser.parse_args()
    found = {}
    for width in arguments.widths:
        found[width] = rows_of(width, arguments.counts)
        print(table(width, found[width]), flush=True)
    if arguments.plot:
        write_bias_plot(arguments.plot, found)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
