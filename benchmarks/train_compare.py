"""The same LoRA at the same bytes, compressed after training and while it trains: what is left of the concept it learned.

    python benchmarks/train_compare.py [--seeds 1 2 3] [--steps 200] [--pictures 128] [--folder DIR] [--plot F.svg] [--json F.json]

tiny-sd learns the striped star through train_network_ext.py with the settings of config/demo.toml, in equal steps every time:

    full        no compression
    afterwards  the full LoRA, compressed by the engine in the same bits, ranks chosen for the bytes of the last arm
    entropy     the full LoRA, entropy-coded to the bytes of the last arm: the best the engine can do with a finished file
    narrow      a LoRA of a smaller rank from the start, trained with quantized weights (qat)
    pruned      components go while it trains, quantization is left to the end
    both        components go while it trains, then it trains with quantized weights

Seed 0 settles how strongly to compress: the first of the settings, from mild to strong, at which the full LoRA compressed
afterwards has lost 20 points of the share of pictures that show the concept. The other seeds are scored. Each file draws the same
prompts from the same noise; the probe in assets/tiny-sd reads concept and caption (shape, colour and background) in the pictures,
and the kernel distance of its features to held-out pictures of the concept tells how good they look. Intervals are of 95 %, over
the pictures of all seeds.
Trainings run two at a time, one thread each; a folder given by --folder keeps what was made, and a second run goes on with it.
--plot needs matplotlib.
"""

from __future__ import annotations

import json
import sys
import tempfile
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_ROOT), str(_ROOT / "benchmarks"), str(_ROOT / "tools")]

from concept import arguments, compressed, scored, share, train  # noqa: E402
from measure import Goal, goal_table, svg_plot  # noqa: E402

_RANK = 16  # of config/demo.toml
_LADDER = ((0.5, 4), (0.25, 4), (0.25, 3), (0.25, 2), (0.125, 3), (0.125, 2), (0.0625, 2))  # rank_ratio, bits; mild to strong
_LOST = 0.20  # points that compression afterwards must lose
_KEPT = 0.5  # of the loss that compression while training must keep from happening
_TRAINED = ("narrow", "pruned", "both")


@dataclass(frozen=True)
class Setting:
    """How strongly to compress."""

    ratio: float
    bits: int

    def flags(self, arm: str) -> list[str]:
        """Of train_network_ext.py."""
        if arm == "full":
            return ["--pruning", "enabled=false", "--quantization", "enabled=false"]
        pruning = ["enabled=true", f"rank_ratio={self.ratio}", "min_rank=0", "iterative_pruning=true"]
        quantization = ["enabled=true", f"bits={self.bits}", "save_format=packed"]
        if arm != "pruned":
            quantization += ["qat=true", "qat_start=0.5"]
        if arm != "narrow":
            return ["--pruning", *pruning, "--quantization", *quantization]
        rank = max(round(self.ratio * _RANK), 1)
        size = [f"--network_dim={rank}", f"--network_alpha={rank}"]
        return [*size, "--pruning", "enabled=false", "--quantization", *quantization]


class Comparison:
    """All arms of all seeds, in a folder that keeps what was made."""

    def __init__(self, folder: Path, steps: int, pictures: int) -> None:
        from lora_compress.evaluation.shapes import write_dataset

        self.folder, self.steps, self.pictures = folder, steps, pictures
        if not (folder / "data").exists():
            write_dataset(folder / "data", count=96)

    def trained(self, setting: Setting, arm: str, seed: int) -> Path:
        """The file that a training ends with."""
        name = f"full-{seed}" if arm == "full" else f"{arm}-{setting.ratio}-{setting.bits}-{seed}"
        return train(self.folder, name, seed, self.steps, setting.flags(arm))

    def afterwards(self, setting: Setting, seed: int) -> Path:
        """The full LoRA, compressed with the same settings."""
        return self._compressed("settle", setting, seed, {"rank_ratio": setting.ratio, "bits": setting.bits, "min_rank": 0})

    def _compressed(self, name: str, setting: Setting, seed: int, settings: Mapping[str, Any]) -> Path:
        target = self.folder / f"{name}-{setting.ratio}-{setting.bits}-{seed}.safetensors"
        return compressed(self.trained(setting, "full", seed), target, settings)

    def scored(self, lora: Path) -> dict[str, Any]:
        """Bytes and score of a file."""
        return scored(lora, self.pictures)

    def settle(self, seed: int) -> Setting:
        """The mildest setting at which compression afterwards has lost enough."""
        full = share(self.scored(self.trained(Setting(*_LADDER[0]), "full", seed)), "concept")

        def lost(step: tuple[float, int]) -> bool:
            left = share(self.scored(self.afterwards(Setting(*step), seed)), "concept")
            print(f"seed {seed}, rank_ratio {step[0]:g}, {step[1]} bits: {full:.1%} -> {left:.1%}", flush=True)
            return full - left >= _LOST

        first = bisect_left(_LADDER, True, key=lost)  # whatever is stronger loses more
        if first == len(_LADDER):
            raise SystemExit(f"error: nothing on the ladder loses {_LOST:.0%} of the concept on seed {seed}")
        return Setting(*_LADDER[first])

    def arms(self, setting: Setting, seeds: Sequence[int], pool: ThreadPoolExecutor) -> dict[int, dict[str, dict[str, Any]]]:
        """Every arm of every seed, scored."""

        def scored(arm: str, seed: int) -> dict[str, Any]:
            if arm in codecs:
                size = f"{self.trained(setting, 'both', seed).stat().st_size}B"
                settings = {**codecs[arm], "target_size": size, "min_rank": 0}
                return self.scored(self._compressed(arm, setting, seed, settings))
            return self.scored(self.trained(setting, arm, seed))

        codecs: dict[str, dict[str, Any]] = {"afterwards": {"bits": setting.bits}, "entropy": {"strategy": "entropy"}}
        trainings = [pool.submit(self.trained, setting, arm, seed) for seed in seeds for arm in ("full", *reversed(_TRAINED))]
        for training in trainings:  # none is scored while others still need its file
            training.result()
        scores = {(seed, arm): pool.submit(scored, arm, seed) for seed in seeds for arm in ("full", *codecs, *_TRAINED)}
        return {seed: {arm: scores[seed, arm].result() for arm in ("full", *codecs, *_TRAINED)} for seed in seeds}


def summed_up(seeds: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Means over the seeds, with intervals over all pictures."""
    import torch

    from lora_compress.evaluation.intervals import bootstrap_interval

    found: dict[str, dict[str, Any]] = {}
    for arm in next(iter(seeds.values())):
        scores = [arms[arm] for arms in seeds.values()]
        line: dict[str, Any] = {"bytes": sum(s["bytes"] for s in scores) / len(scores)}
        line["distance"] = [s["distance"] for s in scores]
        for what in ("concept", "caption"):
            pictures = torch.tensor([hit for s in scores for hit in s[what]], dtype=torch.float64)
            line[what] = (float(pictures.mean()), *bootstrap_interval(pictures))
        found[arm] = line
    return found


def goals(found: Mapping[str, Mapping[str, Any]]) -> list[Goal]:
    """Of the loss of each way to compress afterwards, where there is one, what compression while training keeps from happening."""
    full, both = found["full"]["concept"][0], found["both"]
    lines = []
    for arm in ("afterwards", "entropy"):
        lost = full - found[arm]["concept"][0]
        if lost > 0:
            kept = (both["concept"][0] - found[arm]["concept"][0]) / lost
            lines.append(Goal(f"share of the loss of '{arm}' that 'both' keeps from happening", _KEPT, kept, at_least=True))
        lines.append(Goal(f"bytes of 'both' / bytes of '{arm}'", 1.02, both["bytes"] / found[arm]["bytes"]))
    return lines


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """In Markdown."""

    def told(value: Sequence[float]) -> str:
        return f"{value[0]:.1%} ({value[1]:.1%} to {value[2]:.1%})"

    rows = (
        f"| {arm} | {line['bytes']:,.0f} | {told(line['concept'])} | {told(line['caption'])} | "
        f"{', '.join(f'{value:.3f}' for value in line['distance'])} |\n"
        for arm, line in found.items()
    )
    head = "| | bytes | concept | caption | kernel distance to held-out pictures, by seed |\n|---|---|---|---|---|\n"
    return head + "".join(rows)


def plot(path: Path, found: Mapping[str, Mapping[str, Any]]) -> None:
    """The share of pictures that show the concept, with its interval, a line for each arm."""
    with svg_plot(path, figsize=(7.5, 3)) as axis:
        for place, (arm, line) in enumerate(found.items()):
            middle, low, high = (100 * value for value in line["concept"])
            colour = "#0b57d0" if arm in _TRAINED else "#c2410c" if arm != "full" else "#555555"
            axis.errorbar(middle, place, xerr=[[middle - low], [high - middle]], fmt="o", color=colour, capsize=3)
        axis.set_yticks(range(len(found)), [f"{arm}, {line['bytes'] / 1e3:,.0f} kB" for arm, line in found.items()])
        axis.invert_yaxis()
        axis.set_xlabel("pictures that show the concept, %")
        axis.grid(axis="x", alpha=0.3)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--pictures", type=int, default=128, help="drawn for each file")
    parser.add_argument("--plot", type=Path, help="write an SVG")
    parser.add_argument("--setting", nargs=2, metavar=("RATIO", "BITS"), help="take this one instead of what seed 0 settles")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(2) as pool:
        folder = (given.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        comparison = Comparison(folder, given.steps, given.pictures)
        setting = Setting(float(given.setting[0]), int(given.setting[1])) if given.setting else None
        ahead = [pool.submit(comparison.trained, Setting(1.0, 4), "full", seed) for seed in given.seeds]  # needed in any case
        setting = setting or comparison.settle(0)
        for future in ahead:
            future.result()
        seeds = comparison.arms(setting, given.seeds, pool)
    found = summed_up(seeds)
    print(f"rank_ratio {setting.ratio:g}, {setting.bits} bits, seeds {', '.join(map(str, seeds))}\n\n{table(found)}")
    print(goal_table(goals(found)))
    if given.plot:
        plot(given.plot, found)
    if given.json:
        text = json.dumps({"setting": [setting.ratio, setting.bits], "arms": found}, indent=1) + "\n"
        given.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
