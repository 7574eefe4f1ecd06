"""A LoRA of SDXL from rank 64 to 32, ours beside sd-scripts' networks/resize_lora.py; then packed files back to a state dict.

    python benchmarks/resize.py [--all] [--models sdxl flux sd15] [--only resize|decode] [--folder DIR] [--json OUT.json]

Files of real shapes are made first (see lora_files.py). Each measured side works in a fresh process; importing is not counted on
either side. sd-scripts' side takes minutes, so one module of each shape stands for all of that shape, and what it spends on
reading and writing files is left out; --all runs its script over the whole file instead. What is compared with reading and
writing is the whole of compress_file, fsync included, against safetensors loading every tensor of the input into memory and
saving the tensors of the output, fsync included; both write a new file, and take turns. Seconds are those of the clock; beside
them stand seconds of processor time, which other work on the machine moves less. --every N takes every N-th module, for a quick
look.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_ROOT), str(_ROOT / "benchmarks")]

from lora_files import MODELS, write_lora  # noqa: E402
from measure import Goal, Run, answer, fresh, goal_table, settled  # noqa: E402

from networks.sd_scripts_lookup import find_sd_scripts, remedy, sd_scripts_version  # noqa: E402

_RANKS = {"sdxl": 64, "flux": 64, "sd15": 128}  # of the inputs; outputs have half
_FP16_ROUNDING = 2.0**-10  # of two factors, each to 2^-11
_PACKED: dict[str, dict[str, Any]] = {
    "entropy, 3 bits": {"strategy": "entropy", "bits": 3},
    "progressive, 3 bits": {"strategy": "entropy", "bits": 3, "progressive": True},
    "int8": {"bits": 8},
    "int4": {"bits": 4},
}
_SPEEDS = {"entropy, 3 bits": 25.0, "progressive, 3 bits": 10.0, "int8": 100.0, "int4": 100.0}  # M weights/s of a core


def ours(source: str, target: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Compress a file."""
    from lora_compress import CompressionSettings
    from lora_compress.engine.to_file import compress_file

    parsed = CompressionSettings.parse(settings)
    _start_afresh(target)
    started, used = time.monotonic(), time.process_time()
    report = compress_file(source, target, parsed)
    told = {"seconds": time.monotonic() - started, "cpu": time.process_time() - used}
    return told | {"bytes": report.bytes, "error": report.relative_error, "modules": len(report.modules)}


def plain_io(source: str, result: str, target: str) -> dict[str, Any]:
    """Read every tensor of `source` into memory and write the tensors of `result`, with safetensors alone."""
    torch.set_num_threads(1)  # a copy gains nothing by more, and on a busy machine they wait for each other
    output = {key: tensor.clone() for key, tensor in load_file(result).items()}
    _start_afresh(target)
    started, used = time.monotonic(), time.process_time()
    tensors = {key: tensor.clone() for key, tensor in load_file(source).items()}  # cloned: it maps the file and reads nothing
    save_file(output, target)
    with open(target, "rb+") as file:
        os.fsync(file.fileno())
    return {"seconds": time.monotonic() - started, "cpu": time.process_time() - used, "tensors": len(tensors)}


def _start_afresh(target: str) -> None:
    """What importing and an earlier run have left to be cleared away is none of what is measured."""
    Path(target).unlink(missing_ok=True)
    gc.collect()


def sd_modules(source: str, names: list[str], rank: int, target: str) -> dict[str, Any]:
    """sd-scripts' own function on some modules, each alone: seconds by name, its float32 result in a file."""
    import networks.sd_scripts_path  # noqa: F401  joins its folders with ours

    # isort: split
    from networks.resize_lora import resize_lora_model

    results, seconds, cpu = {}, {}, {}
    with safe_open(source, "pt") as file:
        for name in names:
            endings = ("lora_down.weight", "lora_up.weight", "alpha")
            module = {f"{name}.{ending}": file.get_tensor(f"{name}.{ending}").float() for ending in endings}
            started, used = time.monotonic(), time.process_time()
            made, _, _ = resize_lora_model(module, rank, rank, torch.float32, "cpu", None, None, False)
            seconds[name], cpu[name] = time.monotonic() - started, time.process_time() - used
            results |= made
    save_file(results, target)
    return {"seconds": sum(seconds.values()), "each": seconds, "each_cpu": cpu}


def sd_command(source: str, rank: int, target: str) -> dict[str, Any]:
    """sd-scripts' own command over the whole file."""
    import networks.sd_scripts_path  # noqa: F401

    # isort: split
    from networks.resize_lora import resize, setup_parser

    command = ["--model", source, "--save_to", target, "--new_rank", str(rank), "--save_precision", "float"]
    started, used = time.monotonic(), time.process_time()
    resize(setup_parser().parse_args(command))
    return {"seconds": time.monotonic() - started, "cpu": time.process_time() - used}


def decode(path: str, threads: int, times: int = 1) -> dict[str, Any]:
    """A packed file to a float16 state dict, some times: the first on the clock, the fastest in processor time."""
    from lora_compress.api import load_compressed_lora

    torch.set_num_threads(threads)
    clock, used = [], []
    for _ in range(times):
        started, before = time.monotonic(), time.process_time()
        tensors = load_compressed_lora(path)
        clock.append(time.monotonic() - started)
        used.append(time.process_time() - before)
    return {"seconds": clock[0], "cpu": min(used), "weights": sum(tensor.numel() for tensor in tensors.values())}


_TASKS = {"ours": ours, "plain_io": plain_io, "sd_modules": sd_modules, "sd_command": sd_command, "decode": decode}
_SCRIPT = Path(__file__).resolve()


def sample_of(model: str, every: int) -> dict[str, int]:
    """{module: modules that have its shape}, one of each shape."""
    shapes = [(name, (inputs, outputs, kernel)) for name, inputs, outputs, kernel in list(MODELS[model]())[::every]]
    counts = Counter(shape for _, shape in shapes)
    return {name: counts[shape] for shape, name in {shape: name for name, shape in reversed(shapes)}.items()}


def disagreement(source: Path, first: Path, second: Path, names: list[str]) -> dict[str, float]:
    """||dW1 - dW2|| / ||dW2|| over some modules of two results, and the error of either against the source."""
    from lora_compress import open_lora
    from lora_compress.update import relative_error, squared_error

    files = [open_lora(path) for path in (source, first, second)]
    triples = [tuple(file[name] for file in files) for name in names]

    def apart(one: int, other: int) -> float:
        pairs = [squared_error(triple[one], triple[other]) for triple in triples]
        return relative_error(sum(error for error, _ in pairs), sum(norm for _, norm in pairs))

    return {"apart": apart(2, 1), "ours": apart(0, 1), "theirs": apart(0, 2)}


def resize_line(model: str, folder: Path, every: int, whole: bool, repeats: int) -> dict[str, Any]:
    """All sides on one model."""
    rank = _RANKS[model]
    source, target = folder / f"{model}.safetensors", folder / f"{model}-ours.safetensors"
    modules = write_lora(source, model, rank, every)
    settings = {"new_rank": rank // 2}
    us, io = settled(
        repeats,
        lambda: fresh(_SCRIPT, "ours", source=source, target=target, settings=settings),
        lambda: fresh(_SCRIPT, "plain_io", source=source, result=target, target=folder / "io.safetensors"),
    )
    line: dict[str, Any] = {
        "model": model,
        "modules": modules,
        "megabytes": [size / 1e6 for size in us.said["bytes"]],
        "seconds": us.said["seconds"],
        "cpu_seconds": us.said["cpu"],
        "seconds_with_import": us.seconds,
        "peak_megabytes": us.peak / 1e6,
        "read_write_seconds": io.said["seconds"],
        "read_write_cpu_seconds": io.said["cpu"],
        "error": us.said["error"],
    }
    root = find_sd_scripts()
    if root is None:
        print(f"sd-scripts was not found, its side is left out: {remedy()}", file=sys.stderr)
        return line
    sample, theirs = sample_of(model, every), folder / f"{model}-sd.safetensors"
    line |= {"sd_scripts": sd_scripts_version(root), "sd_sample": modules if whole else len(sample)}
    if whole:
        told = fresh(_SCRIPT, "sd_command", source=source, rank=rank // 2, target=theirs)
        line |= {"sd_seconds": told.said["seconds"], "sd_cpu_seconds": told.said["cpu"]}
    else:
        told = fresh(_SCRIPT, "sd_modules", source=source, names=list(sample), rank=rank // 2, target=theirs)
        for key, each in (("sd_seconds", "each"), ("sd_cpu_seconds", "each_cpu")):
            line[key] = sum(told.said[each][name] * count for name, count in sample.items())
    line["sd_peak_megabytes"] = told.peak / 1e6
    return line | {"agreement": disagreement(source, target, theirs, list(sample))}


def resize_goals(line: Mapping[str, Any]) -> list[Goal]:
    """Memory and agreement of every model, times of SDXL: for the layers of FLUX sd-scripts takes a randomized decomposition."""
    model = line["model"]
    goals = [Goal(f"{model}: anonymous memory, MB", 450, line["peak_megabytes"])]
    if model == "sdxl":
        goals.append(Goal(f"{model}: time / time of reading and writing", 3, line["seconds"] / line["read_write_seconds"]))
    if "sd_seconds" in line:
        if model == "sdxl":
            goals.append(Goal(f"{model}: time of sd-scripts / ours", 150, line["sd_seconds"] / line["seconds"], at_least=True))
        goals.append(Goal(f"{model}: ||ours - sd-scripts|| / ||dW||, sample", _FP16_ROUNDING, line["agreement"]["apart"]))
    return goals


def decode_lines(folder: Path, every: int, repeats: int, only: list[str]) -> list[dict[str, Any]]:
    """SDXL of rank 64 packed at rank 32, each codec back to a state dict."""
    source = folder / "sdxl.safetensors"
    write_lora(source, "sdxl", _RANKS["sdxl"], every)
    lines = []
    for name in only:
        target = folder / "packed.safetensors"
        settings = {"new_rank": _RANKS["sdxl"] // 2, **_PACKED[name]}
        packed = fresh(_SCRIPT, "ours", source=source, target=target, settings=settings)
        one, two = (_decoded(target, threads, times, repeats) for threads, times in ((1, 3), (2, 1)))
        lines.append(
            {
                "codec": name,
                "megabytes": packed.said["bytes"][1] / 1e6,
                "error": packed.said["error"],
                "pack_seconds": packed.said["seconds"],
                "pack_cpu": packed.said["cpu"],
                "pack_peak_megabytes": packed.peak / 1e6,
                "weights": one.said["weights"],
                "seconds": two.said["seconds"],
                "million_per_cpu_second": one.said["weights"] / one.said["cpu"] / 1e6,
            }
        )
    return lines


def _decoded(path: Path, threads: int, times: int, repeats: int) -> Run:
    (run,) = settled(repeats, lambda: fresh(_SCRIPT, "decode", path=path, threads=threads, times=times))
    return run


def decode_goals(lines: list[dict[str, Any]], every: int) -> list[Goal]:
    """Seconds for the whole file on two threads in a fresh process, and weights per second of processor time on one in a warm one.

    The first time includes loading tables and the compiled loops. Two threads may share a core, and then each takes longer over the
    same work: their processor time is no measure of a core.
    """
    goals = []
    for line in lines:
        name = f"decode {line['codec']}: M weights/s per core"
        goals.append(Goal(name, _SPEEDS[line["codec"]], line["million_per_cpu_second"], at_least=True))
        if line["codec"].startswith("entropy") and every == 1:
            goals.append(Goal("decode entropy: s for SDXL at rank 32, two cores", 4, line["seconds"]))
    return goals


def main() -> None:
    if answer(_TASKS, sys.argv[1:]):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="sd-scripts' command over whole files: 10 minutes for SDXL")
    parser.add_argument("--models", nargs="+", choices=list(_RANKS), default=list(_RANKS))
    parser.add_argument("--codecs", nargs="+", choices=list(_PACKED), default=list(_PACKED))
    parser.add_argument("--every", type=int, default=1, help="take every N-th module")
    parser.add_argument("--repeats", type=int, default=3, help="of our side and of reading and writing; the fastest counts")
    parser.add_argument("--only", choices=("resize", "decode"), help="half of it")
    parser.add_argument("--folder", type=Path, help="for the files, 1.5 GB; default a temporary one, removed at the end")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    lines: list[dict[str, Any]] = []
    goals: list[Goal] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        for model in arguments.models if arguments.only != "decode" else ():
            lines.append(resize_line(model, folder, arguments.every, arguments.all, arguments.repeats))
            goals += resize_goals(lines[-1])
            print(json.dumps(lines[-1]), flush=True)
        if arguments.only != "resize":
            lines += (decoded := decode_lines(folder, arguments.every, arguments.repeats, arguments.codecs))
            goals += decode_goals(decoded, arguments.every)
            for line in decoded:
                print(json.dumps(line))
    print(goal_table(goals))
    if arguments.json:
        arguments.json.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
