"""A training that adapts its own compression, in both modes of [adaptive], beside one of equal bytes that was told what to do.

    python benchmarks/adaptive_demo.py [--steps 200] [--every 20] [--folder DIR] [--plot docs/images/adaptive.svg] [--json OUT.json]

tiny-sd learns the striped star through train_network_ext.py with config/demo.toml. Pruning and quantization come about in the first
fifth, from rank_ratio 0.9 and 8 bits; from then on the probe in assets/tiny-sd compares pictures of the training with held-out ones
every `every` steps, and fid_trend or fid_gap decides. The hand-tuned training has the last rank_ratio and bits of the fid_gap run
from the start. Final files are scored as in benchmarks/train_compare.py. --plot needs matplotlib.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_ROOT), str(_ROOT / "benchmarks"), str(_ROOT / "tools")]

from concept import arguments, scored, share, train  # noqa: E402
from measure import Goal, goal_table, svg_plot  # noqa: E402

_MODES = ("fid_trend", "fid_gap")
_SCHEDULE = ["iterative_pruning=true", "pruning_start=0.02", "pruning_end=0.2", "min_rank=0"]
_PANELS = {
    "bytes": "bytes of the file",
    "rank_ratio": "rank_ratio",
    "bits": "bits",
    "metric": "probe_fd, and of the full weights (dashed)",
}
_COLOURS = {"fid_trend": "#c2410c", "fid_gap": "#0b57d0"}

History = Sequence[Mapping[str, Any]]


def flags(ratio: float, bits: float) -> list[str]:
    """Of a training with this compression."""
    pruning = [*_SCHEDULE, "enabled=true", f"rank_ratio={ratio}"]
    return [
        "--pruning",
        *pruning,
        "--quantization",
        "enabled=true",
        f"bits={bits:g}",
        "save_format=packed",
        "qat=true",
        "qat_start=0.2",
    ]


def adapt(folder: Path, mode: str, steps: int, every: int, pictures: int) -> tuple[Path, History]:
    """The file of a training that adapts itself, and its history."""
    evaluation = ["extractor=probe", f"reference={folder / 'held'}", f"count={pictures}", "size=64", "steps=6", "guidance=2.5"]
    adaptive = [f"mode={mode}", "patience=1", "max_fid_gap=0.1"]
    drawn = ["--sample_sampler=dpmsolver++", f"--validate_every_n_steps={every}"]  # the host's ddim clips latents to [-1, 1]
    more = [*drawn, "--evaluation", *evaluation, "--adaptive", *adaptive]
    file = train(folder, f"adaptive-{mode}", 1, steps, [*flags(0.9, 8), *more])
    lines = (folder / f"adaptive-{mode}.evaluations.jsonl").read_text(encoding="utf-8").splitlines()
    return file, [json.loads(line) for line in lines]


def plot(path: Path, histories: Mapping[str, History]) -> None:
    """Bytes, rank_ratio, bits and metric over the steps, a line for each mode."""
    with svg_plot(path, 2, 2, figsize=(9, 5.5)) as axes:
        for axis, (name, title) in zip(axes.flat, _PANELS.items(), strict=True):
            for mode, history in histories.items():
                key = "probe_fd" if name == "metric" else name
                points = [(entry["step"], entry[key]) for entry in history if entry.get(key) is not None]
                axis.plot(*zip(*points, strict=True), color=_COLOURS[mode], label=mode, marker="o", markersize=3)
                full = [
                    (entry["step"], entry["probe_fd_full"]) for entry in history if name == "metric" and "probe_fd_full" in entry
                ]
                if full:
                    axis.plot(*zip(*full, strict=True), color=_COLOURS[mode], linestyle="--", linewidth=1)
            axis.set(title=title, xlabel="step")
            axis.grid(alpha=0.3)
        axes.flat[0].legend()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--every", type=int, default=20, help="steps between evaluations")
    parser.add_argument("--pictures", type=int, default=24, help="drawn for each evaluation; twice as many for the final files")
    parser.add_argument("--plot", type=Path, help="write an SVG")
    given = parser.parse_args()
    from lora_compress.evaluation.shapes import write_dataset

    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(2) as pool:
        folder = (given.folder or Path(temporary)).resolve()
        for name, count, seed in (("data", 96, 0), ("held", 128, 5)):
            if not (folder / name).exists():
                write_dataset(folder / name, count=count, repeats=1 if name == "held" else 10, seed=seed)
        own = (given.steps, given.every, given.pictures)
        runs = dict(zip(_MODES, pool.map(lambda mode: adapt(folder, mode, *own), _MODES), strict=True))
        files = {mode: file for mode, (file, _) in runs.items()}
        levels = [entry for entry in runs["fid_gap"][1] if "rank_ratio" in entry]
        if not levels:
            raise SystemExit("error: no evaluation came after the schedule had ended: more steps, or a smaller --every")
        last = levels[-1]
        files["by hand"] = train(folder, "by-hand", 1, given.steps, flags(last["rank_ratio"], last["bits"]))
        tasks = {name: pool.submit(scored, file, 2 * given.pictures) for name, file in files.items()}
        found = {name: task.result() for name, task in tasks.items()}
    histories = {mode: history for mode, (_, history) in runs.items()}
    for mode, history in histories.items():
        print(f"{mode}:")
        for entry in history:
            print(f"  step {entry['step']}: {entry['action']}, {entry['reason']}")
    print("\n| | bytes | concept | caption | probe_fd |\n|---|---|---|---|---|")
    for name, line in found.items():
        print(f"| {name} | {line['bytes']:,} | {share(line, 'concept'):.1%} | {share(line, 'caption'):.1%} | {line['fd']:.3g} |")
    lines = [Goal("bytes of fid_gap / of the training by hand", 1.02, found["fid_gap"]["bytes"] / found["by hand"]["bytes"])]
    print(f"\n{goal_table(lines)}")
    if given.plot:
        plot(given.plot, histories)
    if given.json:
        given.json.write_text(json.dumps({"histories": histories, "scores": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
