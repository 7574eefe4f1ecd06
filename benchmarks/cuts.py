"""What the beginning of a progressive file costs over a file made afresh: python benchmarks/cuts.py [--lora FILE ...]

Progressive files of the LoRA of rate_distortion.py, of one whose singular values are all alike, and of the trained files that are
given, are truncated to many sizes; each size is divided by that of an entropy-coded file made afresh, without refinement, at the
error of the cut. Whole files, header and index counted; errors are taken from what is decoded.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_ROOT), str(_ROOT / "benchmarks")]

from measure import Goal, goal_table  # noqa: E402
from peers import Point  # noqa: E402
from rate_distortion import SPECTRA, interpolated, synthetic  # noqa: E402

from lora_compress import CompressionSettings, FormatError, LowRankUpdate, as_kohya, compress_file, load_lora, truncate_file  # noqa: E402
from lora_compress.inspection.comparison import compare_files  # noqa: E402
from lora_compress.report.file_report import FileReport  # noqa: E402

_FINEST, _COARSEST = 0.02, 0.5  # errors
_GOAL = 1.10


def made(source: Path, target: Path, error: float, **more: object) -> FileReport:
    """An entropy-coded file."""
    return compress_file(source, target, CompressionSettings.parse({"strategy": "entropy", "target_error": error, **more}))


def cut_costs(updates: Mapping[str, LowRankUpdate], folder: Path, cuts: int, afresh: int) -> list[tuple[float, float, int]]:
    """Of each cut: bytes / bytes afresh, error, bytes."""
    source, progressive, other = (folder / f"{name}.safetensors" for name in ("source", "progressive", "other"))
    save_file({key: tensor.contiguous() for key, tensor in as_kohya(updates).items()}, source)
    errors = np.geomspace(_FINEST / 1.1, min(_COARSEST * 1.3, 0.95), afresh).tolist()
    reports = [made(source, other, error, refine=False) for error in errors]
    curve: list[Point] = [(float(report.bytes[1]), report.relative_error) for report in reports]
    whole = made(source, progressive, _FINEST, progressive=True).bytes[1]
    costs = []
    for wanted in np.geomspace(min(curve)[0], whole, cuts).astype(int).tolist():
        try:
            size = truncate_file(progressive, other, wanted).bytes[1]
        except FormatError:  # no room for the first layer of every module
            continue
        error = compare_files(str(source), str(other)).relative_error
        if _FINEST <= error <= _COARSEST:
            costs.append((size / interpolated(curve, error), error, size))
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", type=Path, nargs="*", default=[], help="trained LoRA files")
    parser.add_argument("--spectra", nargs="*", choices=list(SPECTRA), default=list(SPECTRA))
    parser.add_argument("--cuts", type=int, default=40, help="sizes to cut to")
    parser.add_argument("--afresh", type=int, default=24, help="files made afresh, between which sizes are interpolated")
    parser.add_argument("--json", type=Path, help="also write all cuts to this file")
    arguments = parser.parse_args()
    sets = {kind: synthetic(kind) for kind in arguments.spectra}
    sets |= {f"{path.stem} (trained)": load_lora(path, torch.float32).updates for path in arguments.lora}
    found, goals = {}, []
    for label, updates in sets.items():
        with tempfile.TemporaryDirectory() as folder:
            found[label] = cut_costs(updates, Path(folder), arguments.cuts, arguments.afresh)
        ratios = [ratio for ratio, _, _ in found[label]]
        print(f"{label}: {len(ratios)} cuts, bytes / afresh: mean {np.mean(ratios):.3f}, worst {max(ratios):.3f}", flush=True)
        goals.append(Goal(f"{label}: bytes of a cut / bytes afresh, worst", _GOAL, max(ratios)))
    print(goal_table(goals))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
