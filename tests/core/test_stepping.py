"""Components that are not worth their bits are left out of an entropy-coded file."""

from __future__ import annotations

import pytest
import torch

from lora_compress import CompressionSettings, LowRankUpdate, compress


def _update(sigma: torch.Tensor, width: int = 320) -> LowRankUpdate:
    random = torch.Generator().manual_seed(0)
    down, up = (torch.linalg.qr(torch.randn(width, len(sigma), generator=random))[0] * sigma.sqrt() for _ in range(2))
    return LowRankUpdate(down.T.contiguous(), up, float(len(sigma)))


def _size(update: LowRankUpdate, **settings: float | int) -> int:
    made = compress({"lora_unet_a": update}, CompressionSettings.parse({"strategy": "entropy", **settings}))
    assert made.report.total.relative_error <= settings["target_error"]
    return made.tensors["lora_compress.payload"].numel()


@pytest.mark.parametrize("error", [0.15, 0.25, 0.4])
def test_no_rank_given_by_hand_takes_fewer_bytes(error: float) -> None:
    """Of a falling spectrum: the ranks to the left and to the right of what is chosen are within what their number decides."""
    update = _update(1.0 / torch.arange(1, 33))
    chosen = _size(update, target_error=error)
    by_hand = []
    for rank in range(1, 33):
        kept = (1.0 / torch.arange(1, 33)).square()
        if kept[rank:].sum() < 0.9 * error**2 * kept.sum():
            by_hand.append(_size(update, target_error=error, new_rank=rank))
    assert chosen <= 1.02 * min(by_hand)
    assert max(by_hand) >= chosen


@pytest.mark.parametrize("bits", [0.25, 0.5, 1.0])
def test_of_equal_components_a_part_is_coded_well_rather_than_all_badly(bits: float) -> None:
    made = compress({"lora_unet_a": _update(torch.ones(32))}, CompressionSettings.parse({"strategy": "entropy", "bits": bits}))
    payload, weights = made.tensors["lora_compress.payload"].numel(), 32 * 640
    assert 0.97 * bits <= 8 * payload / weights <= bits
    rank = made.updates["lora_unet_a"].rank
    assert 1.2 <= 8 * payload / (640 * rank) <= 2.2  # bits per coded weight
