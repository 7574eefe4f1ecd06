"""How often the controller decides, and how often wrongly: simulated trainings whose true trend, or true cost, is known.

    python benchmarks/decisions.py [--repeats 200] [--json OUT.json]

Features have eigenvalues 1/i and are as wide as the probe's (128); 64 held-out pictures are the reference. A training is three
evaluations of N pictures. Pictures of its evaluations come from the same noise: `alike` is the correlation of their features. 0 is
the worst case, in which nothing of the errors cancels.

fid_trend: the true distance grows by 0, 0.3 or 1 floor per evaluation. Wrong are relaxing at 0, everything but keeping at 0.3,
compressing at 1. fid_gap, with max_fid_gap 0.1: compression costs 0, 7.5 or 30 %. Wrong are relaxing at 0, everything but keeping
at 7.5 % (above half of what is allowed, and below it), compressing at 30 %.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_ROOT), str(_ROOT / "benchmarks")]

from measure import Goal, goal_table  # noqa: E402

from lora_compress.evaluation.frechet import frechet_distance  # noqa: E402
from lora_compress.evaluation.intervals import jackknife  # noqa: E402
from lora_compress.settings import AdaptiveSettings  # noqa: E402
from lora_compress.training.controller import Compression, decide  # noqa: E402

COUNTS = (8, 24, 64, 256)
TRUTHS = {"fid_trend": (0.0, 0.3, 1.0), "fid_gap": (0.0, 0.075, 0.3)}  # floors per evaluation; of the metric
RIGHT = ("compress", "keep", "relax")  # at each of them, beside keeping for want of evidence
ALIKE = (0.0, 0.9)
WIDTH, REFERENCE, EVALUATIONS = 128, 64, 3
_SETTINGS = {mode: AdaptiveSettings(mode=mode, metric="simulated_fd", max_fid_gap=0.1) for mode in TRUTHS}
_LEVEL = Compression(0.6, 6)  # both ways are open from here


class Simulation:
    """A law of features, and what two samples of N are apart on average.

    Args:
        count: N, pictures of an evaluation.
        width: of the features.
    """

    def __init__(self, count: int, width: int = WIDTH) -> None:
        spread = 1.0 / torch.arange(1, width + 1, dtype=torch.float64)
        self.count, self.spread = count, (spread / spread.sum()).sqrt()
        random = torch.Generator().manual_seed(0)
        self.floor = fmean(frechet_distance(self.sample(count, random), self.sample(count, random)) for _ in range(10))
        self.distance = fmean(frechet_distance(self.sample(count, random), self.sample(REFERENCE, random)) for _ in range(10))

    def sample(self, count: int, random: torch.Generator) -> Tensor:
        """Features (count, width)."""
        return torch.randn(count, len(self.spread), generator=random, dtype=torch.float64) * self.spread

    def history(self, mode: str, truth: float, alike: float, seed: int) -> list[dict[str, Any]]:
        """The entries of a training whose true trend, or true gap, is `truth`: the mean moves by the root of what it adds."""
        random = torch.Generator().manual_seed(seed)
        reference, common = self.sample(REFERENCE, random), self.sample(self.count, random)
        direction, entries = self.spread / self.spread.norm(), []

        def measured(name: str, further: float) -> dict[str, Any]:
            own = math.sqrt(alike) * common + math.sqrt(1.0 - alike) * self.sample(self.count, random)
            features = own + direction * math.sqrt(further)
            replicates = jackknife(frechet_distance, features, reference)
            return {name: frechet_distance(features, reference), f"{name}_jackknife": replicates}

        for place in range(EVALUATIONS):
            entry = {"floor": self.floor, "rank_ratio": _LEVEL.rank_ratio, "bits": _LEVEL.bits, "pictures": self.count}
            if mode == "fid_trend":
                entries.append(entry | measured("simulated_fd", truth * self.floor * place))
            else:
                least = max(self.distance, self.floor)
                entries.append(entry | measured("simulated_fd", truth * least) | measured("simulated_fd_full", 0.0))
        return entries


def line_of(simulation: Simulation, mode: str, alike: float, repeats: int) -> list[dict[str, Any]]:
    """For each truth, the shares of right decisions, of wrong ones, and of keeping."""
    lines = []
    for truth, right in zip(TRUTHS[mode], RIGHT, strict=True):
        histories = (simulation.history(mode, truth, alike, seed) for seed in range(repeats))
        actions = [decide(history, _LEVEL, _SETTINGS[mode]).action for history in histories]
        wrong = sum(action not in (right, "keep") for action in actions) / repeats
        lines.append({"truth": truth, "decided": actions.count(right) / repeats if right != "keep" else None, "wrong": wrong})
    return lines


def table(mode: str, rows: Sequence[tuple[float, int, list[dict[str, Any]]]]) -> str:
    """Markdown: a row for each number of pictures, a column for each truth."""
    names = [f"{truth:g} {'floors' if mode == 'fid_trend' else 'of the metric'}" for truth in TRUTHS[mode]]
    lines = ["| pictures | alike | " + " | ".join(f"{name}: decided, wrong" for name in names) + " |", "|---|---|---|---|---|"]
    for alike, count, cells in rows:
        shares = [("" if cell["decided"] is None else f"{cell['decided']:.0%}, ") + f"{cell['wrong']:.1%}" for cell in cells]
        lines.append(f"| {count} | {alike:g} | " + " | ".join(shares) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=200, help="simulated trainings for each cell")
    parser.add_argument("--json", type=Path, help="write all numbers")
    given = parser.parse_args()
    simulations, found = {count: Simulation(count) for count in COUNTS}, {}
    for mode in TRUTHS:
        found[mode] = [
            (alike, count, line_of(simulations[count], mode, alike, given.repeats)) for alike in ALIKE for count in COUNTS
        ]
        print(f"{mode}:\n\n{table(mode, found[mode])}\n")
    worst = {mode: max(cell["wrong"] for *_, cells in rows for cell in cells) for mode, rows in found.items()}
    print(goal_table([Goal(f"{mode}: largest share of wrong decisions", 0.05, share) for mode, share in worst.items()]))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
