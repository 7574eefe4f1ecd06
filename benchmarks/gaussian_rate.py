"""How far the codecs are from Shannon's bound on Gaussian factors, and how fast they decode.

    python benchmarks/gaussian_rate.py [--rank 32] [--width 1280] [--planes 6] [--json OUT.json]

Each line is one codec at one rate: bits per weight with all side information, relative RMS error of the factors, the gap
R + log2(rms) to Shannon's bound in bits per weight, the time of encoding, the time of encoding with refinement and what that
gains in bits per weight at equal error of the update, and millions of weights decoded to fp16 per second of processor time on one
thread.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lora_compress.quantization import CODECS
from lora_compress.quantization.entropy.codec import EntropyCoded, decode_entropy, encode_entropy
from lora_compress.quantization.entropy.stages import SINGLE, Stages
from lora_compress.update import LowRankUpdate, squared_error

_STEPS_PER_SIGMA = 4.13  # sigma * sqrt(2 pi e) / 2^bits is the step of a rate
_GROUP = 64
_REPEATS = 10
_LAYERS_PER_PLANE = 4  # as in large modules


def measure(name: str, rows: Tensor, encode: Callable[[], tuple[Any, int]], decode: Callable[[Any], Tensor]) -> dict[str, object]:
    """One line: rows (r, n) against what `decode` makes of what `encode` made; encode also tells its bits."""
    encode()
    started = time.process_time()
    coded, bits = encode()
    encoding = time.process_time() - started
    found = decode(coded)
    decoding = float("inf")
    for _ in range(_REPEATS):  # the fastest: one of them waits for a compiler
        started = time.process_time()
        decode(coded).to(torch.float16)
        decoding = min(decoding, time.process_time() - started)
    rms = float((found.double() - rows.double()).norm() / rows.double().norm())
    rate = bits / rows.numel()
    return {
        "codec": name,
        "bits_per_weight": round(rate, 4),
        "relative_rms": round(rms, 6),
        "gap_bits": round(rate + math.log2(rms), 4),
        "encode_ns_per_weight": round(encoding / rows.numel() * 1e9, 1),
        "decode_million_per_s": round(rows.numel() / decoding / 1e6, 1),
    }


def entropy_line(rows: Tensor, bits: float, stages: Stages = SINGLE) -> dict[str, object]:
    """The entropy codec at about `bits`, both factors of a module being halves of rows (2 r, n)."""
    down, up = rows.chunk(2)
    rank, width = down.shape
    step = _STEPS_PER_SIGMA * 2.0**-bits / width**0.5

    def encode() -> tuple[EntropyCoded, int]:
        encoded = encode_entropy(down, up, step, stages=stages, refine=False)
        if encoded.rank < rank:
            raise SystemExit(f"at {bits} bits components round to zero, and the gap is not that of {rank} of them")
        return encoded, 8 * sum(map(len, encoded.chunks))

    def decode(encoded: EntropyCoded) -> Tensor:
        rows = decode_entropy(encoded.chunks, rank, width, width, step, stages)
        return torch.cat([torch.zeros_like(coded).index_copy(0, torch.tensor(encoded.kept), coded) for coded in rows])

    single = stages == SINGLE
    line = measure("entropy" if single else f"progressive, {stages.number} layers", rows, encode, decode)
    return {**line, **refinement(down, up, step)} if single else line


def refinement(down: Tensor, up: Tensor, step: float) -> dict[str, float]:
    """What refining takes and gains: the fall of 1/2 log2 ||dW - dW'||^2, less the bits per weight that it adds."""
    weights, whole = down.numel() + up.numel(), LowRankUpdate.from_matrices(down, up.T, len(down))
    encode_entropy(down, up, step)
    started = time.process_time()
    refined = encode_entropy(down, up, step)
    seconds = time.process_time() - started
    costs = []
    for encoded in (encode_entropy(down, up, step, refine=False), refined):
        coded_down, coded_up = encoded.rows
        error, _ = squared_error(whole, LowRankUpdate.from_matrices(coded_down, coded_up.T, len(coded_down)))
        costs.append(0.5 * math.log2(error) + 8 * sum(map(len, encoded.chunks)) / weights)
    return {"refined_ns_per_weight": round(seconds / weights * 1e9, 1), "refined_gain_bits": round(costs[0] - costs[1], 4)}


def fixed_line(rows: Tensor, name: str) -> dict[str, object]:
    """A fixed-width codec with a bfloat16 scale for each group of 64 weights; codes are not packed, so it has no decoding speed."""
    codec = CODECS[name]

    def encode() -> tuple[object, int]:
        codes, scales = codec.encode(rows, _GROUP)
        return (codes, scales), codes.numel() * codec.bits + scales.numel() * 16

    line = measure(f"{name}, groups of {_GROUP}", rows, encode, lambda coded: codec.decode(*coded, _GROUP))  # type: ignore[misc]
    return {**line, "decode_million_per_s": None}


def _told(number: object) -> str:
    return "-" if number is None else str(number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=32, help="components of the module")
    parser.add_argument("--width", type=int, default=1280, help="width of both factors")
    parser.add_argument("--planes", type=int, default=6, help="bit planes of the progressive payload")
    parser.add_argument("--json", type=Path, help="also write the lines to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(2 * arguments.rank, arguments.width, generator=random) / arguments.width**0.5
    lines = [entropy_line(rows, bits) for bits in (0.25, 0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10)]
    stages = Stages(_LAYERS_PER_PLANE * arguments.planes, _LAYERS_PER_PLANE)
    lines += [entropy_line(rows, bits, stages) for bits in (1, 2, 3, 4, 6, 8)]
    lines += [fixed_line(rows, name) for name in CODECS]
    print(f"{'codec':24}{'bits/weight':>12}{'rms':>10}{'gap':>8}{'encode ns':>11}{'refined ns':>12}{'gain':>8}{'decode M/s':>12}")
    for line in lines:
        speed, refined, gain = (line.get(key) for key in ("decode_million_per_s", "refined_ns_per_weight", "refined_gain_bits"))
        print(
            f"{line['codec']:24}{line['bits_per_weight']:12.3f}{line['relative_rms']:10.5f}{line['gap_bits']:8.3f}"
            f"{line['encode_ns_per_weight']:11.1f}{_told(refined):>12}{_told(gain):>8}{_told(speed):>12}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
