"""What rank_ratio and bits really cost on tiny-sd, beside what is widely quoted for them.

    python benchmarks/loss_table.py [--seeds 1 2 3] [--steps 200] [--pictures 128] [--folder DIR] [--json OUT.json]

A LoRA of rank 16 learns the striped star with each seed and is compressed afterwards: rank_ratio 0.8, 0.6 and 0.4, each with 8 and
4 bits, then entropy-coded to 15 and to 10 % of the bytes of its fp16 file. Each file draws the same prompts from one noise, and
the probe in assets/tiny-sd reads them. The loss is what the distance from held-out pictures of the concept has grown by against
the full LoRA's, in its Fréchet distance (probe_fd) and kernel distance (KID's estimator, probe_kd); the floor is by how much these
differ between two drawings of the full LoRA from different noise: below it two files cannot be told apart. Means over the
seeds; intervals are of 95 %, over the pictures: of the growth by the jackknife, pictures of one prompt and noise going together.
Folders of benchmarks/train_compare.py have the trainings already.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_ROOT), str(_ROOT / "benchmarks"), str(_ROOT / "tools")]

from concept import arguments, compressed, held_out_features, scored, share, train  # noqa: E402
from measure import Goal, goal_table  # noqa: E402

_OFF = ["--pruning", "enabled=false", "--quantization", "enabled=false"]
_QUOTED = {0.8: ("30 to 40 %", "under 1 %"), 0.6: ("40 to 55 %", "1 to 3 %"), 0.4: ("55 to 70 %", "3 to 5 %")}  # smaller, loss
_SMALLER = 0.85  # share of the fp16 file's bytes that must be saved with the loss inside the floor

Scores = Mapping[str, Any]


def variants(whole: int) -> dict[str, dict[str, Any]]:
    """Settings by name, for a full file of so many bytes in fp16."""
    found: dict[str, dict[str, Any]] = {
        f"rank_ratio {ratio:g}, {bits} bits": {"rank_ratio": ratio, "bits": bits, "min_rank": 0}
        for ratio in _QUOTED
        for bits in (8, 4)
    }
    return found | {
        f"entropy, {part:.0%} of the bytes": {"strategy": "entropy", "target_size": f"{int(whole * part)}B", "min_rank": 0}
        for part in (0.15, 0.1)
    }


def measure(folder: Path, seed: int, steps: int, pictures: int) -> dict[str, Scores]:
    """Scores of the full LoRA of a seed and of all that is made of it; kept beside the files."""
    full = train(folder, f"full-{seed}", seed, steps, _OFF)
    found = {"full": scored(full, pictures, floor=True)}
    for name, settings in variants(os.path.getsize(full)).items():
        target = folder / f"loss-{name.replace(' ', '').replace('%', '').replace(',', '-')}-{seed}.safetensors"
        found[name] = scored(compressed(full, target, settings), pictures)
    return found


def growth_interval(distance: Callable[[Any, Any], float], seeds: Sequence[Mapping[str, Scores]], name: str, real: Any) -> Any:
    """Of the mean over the seeds of how much further a file's pictures are from held-out ones than the full LoRA's."""
    import torch

    from lora_compress.evaluation.intervals import jackknife_interval

    def growth(pictures: Any, held_out: Any) -> float:
        width = held_out.shape[1]
        return distance(pictures[:, :width], held_out) - distance(pictures[:, width:], held_out)

    middle, reach = 0.0, 0.0
    for seed in seeds:
        both = torch.cat([torch.tensor(seed[which]["features"]) for which in (name, "full")], dim=1)
        low, high = jackknife_interval(growth, both, real)
        middle, reach = middle + (low + high) / 2, reach + ((high - low) / 2) ** 2
    return (middle - reach**0.5) / len(seeds), (middle + reach**0.5) / len(seeds)


def lines_of(seeds: Sequence[Mapping[str, Scores]]) -> dict[str, dict[str, Any]]:
    """A line for each variant: share of bytes saved, loss in both distances and their floors, concept with its interval."""
    import torch

    from lora_compress.evaluation.frechet import frechet_distance
    from lora_compress.evaluation.intervals import bootstrap_interval
    from lora_compress.evaluation.kernels import kernel_distance

    real = held_out_features(len(seeds[0]["full"]["features"]))
    found = {}
    for name in seeds[0]:
        hits = torch.tensor([hit for seed in seeds for hit in seed[name]["concept"]], dtype=torch.float64)
        found[name] = {
            "saved": 1 - fmean(seed[name]["bytes"] / seed["full"]["bytes"] for seed in seeds),
            "fd": fmean(seed[name]["fd"] - seed["full"]["fd"] for seed in seeds),
            "kd": fmean(seed[name]["distance"] - seed["full"]["distance"] for seed in seeds),
            "fd_interval": growth_interval(frechet_distance, seeds, name, real),
            "kd_interval": growth_interval(kernel_distance, seeds, name, real),
            "fd_floor": fmean(seed["full"]["floor_fd"] for seed in seeds),
            "kd_floor": fmean(seed["full"]["floor_distance"] for seed in seeds),
            "concept": (float(hits.mean()), *bootstrap_interval(hits)),
            "concept_lost": fmean(1 - share(seed[name], "concept") / max(share(seed["full"], "concept"), 1e-9) for seed in seeds),
        }
    return found


def table(lines: Mapping[str, Mapping[str, Any]]) -> str:
    """In Markdown."""

    def told(what: str, line: Mapping[str, Any]) -> str:
        return "{:+.3g} ({:+.3g} to {:+.3g})".format(line[what], *line[f"{what}_interval"])

    rows = [
        "| | smaller | quoted | probe_fd, growth | probe_kd, growth | concept | of it lost | quoted |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, line in lines.items():
        ratio = float(name.split()[1].rstrip(",")) if name.startswith("rank_ratio") else 0.0
        smaller, loss = _QUOTED.get(ratio, ("-", "-"))
        concept = "{:.1%} ({:.1%} to {:.1%})".format(*line["concept"])
        rows.append(
            f"| {name} | {line['saved']:.1%} | {smaller} | {told('fd', line)} | {told('kd', line)} | {concept} | "
            f"{line['concept_lost']:+.1%} | {loss} |"
        )
    return "\n".join(rows)


def goals(lines: Mapping[str, Mapping[str, Any]]) -> list[Goal]:
    """The most that is saved with the loss inside the floor."""
    inside = [line["saved"] for name, line in lines.items() if name != "full" and line["fd"] <= line["fd_floor"]]
    return [Goal("share of the bytes saved, loss in probe_fd inside its floor", _SMALLER, max(inside, default=0.0), at_least=True)]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--pictures", type=int, default=128, help="drawn for each file")
    given = parser.parse_args()
    from lora_compress.evaluation.shapes import write_dataset

    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(2) as pool:
        folder = (given.folder or Path(temporary)).resolve()
        if not (folder / "data").exists():
            write_dataset(folder / "data", count=96)
        tasks = [pool.submit(measure, folder, seed, given.steps, given.pictures) for seed in given.seeds]
        lines = lines_of([task.result() for task in tasks])
    floors = lines["full"]
    print(f"seeds {', '.join(map(str, given.seeds))}, {given.pictures} pictures")
    print(f"floors: probe_fd {floors['fd_floor']:.3g}, probe_kd {floors['kd_floor']:.3g}\n")
    print(f"{table(lines)}\n")
    print(goal_table(goals(lines)))
    if given.json:
        given.json.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
