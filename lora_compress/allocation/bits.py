"""Rank and bits together: every component is dropped or stored in one of the offered widths."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor

from .ladders import Integers, Ladder, climb_to_error, climb_to_size
from .ranks import groups_of, squared_norms

__all__ = ["bits_for_error", "bits_for_size"]


def bits_for_size(
    sigmas: Mapping[str, Tensor],
    widths: Mapping[str, int],
    distortion: Mapping[int, float],
    budget: int,
    *,
    overhead: Mapping[str, int] | None = None,
    component_bytes: Callable[[str, int], int] | None = None,
    weights: Mapping[str, float] | None = None,
    protected: Collection[str] = (),
) -> dict[str, tuple[int, ...]]:
    """Bits of the kept components of each module, strongest first and never rising, for the least error in at most `budget` bytes.

    A component whose factors are both coded with relative squared error d adds sigma^2 (2 d + d^2) to the squared error, as for
    independent errors e, f of unit vectors E||(u + e)(v + f)^T - u v^T||^2 = ||e||^2 + ||f||^2 + ||e||^2 ||f||^2; a dropped one
    adds sigma^2. Each component climbs the lower convex hull of (bytes, error) over the widths, and all steps of all components
    compete by error saved per byte: reverse water-filling in steps (Shoham and Gersho 1988, https://doi.org/10.1109/29.90373).

    Args:
        sigmas: effective singular values (or scores) per module, each (k,), falling.
        widths: weights of one component, inputs * kernel + outputs.
        distortion: relative squared error of a factor by the bits it is coded in.
        budget: bytes for all modules.
        overhead: bytes of having the module at all, 0 where absent.
        component_bytes: bytes of one component of a module at these bits, scales included; default ceil(width * bits / 8).
        weights: w_m, 1 where absent.
        protected: modules that keep a component in any case.

    Returns:
        bits per kept component, () for a dropped module. Components beyond the tuple are dropped.

    Raises:
        SettingsError: the protected modules alone exceed the budget.
    """
    plans = _plans(sigmas, widths, distortion, overhead, component_bytes, weights, protected)
    return _read(plans, climb_to_size({name: plan.ladder for name, plan in plans.items()}, budget))


def bits_for_error(
    sigmas: Mapping[str, Tensor],
    widths: Mapping[str, int],
    distortion: Mapping[int, float],
    error: float | None,
    *,
    part_errors: Mapping[str, float] | None = None,
    parts: Mapping[str, str] | None = None,
    overhead: Mapping[str, int] | None = None,
    component_bytes: Callable[[str, int], int] | None = None,
    weights: Mapping[str, float] | None = None,
    protected: Collection[str] = (),
) -> dict[str, tuple[int, ...]]:
    """The same for the fewest bytes at a relative error of at most `error`, and at most part_errors[p] over each part p.

    Raises:
        SettingsError: the target is below what the most bits reach with every component kept.
    """
    plans = _plans(sigmas, widths, distortion, overhead, component_bytes, weights, protected)
    errors, groups = groups_of(list(sigmas), error, part_errors, parts)
    ladders = {name: plan.ladder for name, plan in plans.items()}
    return _read(plans, climb_to_error(ladders, squared_norms(sigmas, weights), errors, groups))


@dataclass(frozen=True)
class _Plan:
    """A module's ladder, and what its items mean: item j raises component owner[j] to bits[j]."""

    ladder: Ladder
    owner: Integers
    bits: Integers


def _plans(
    sigmas: Mapping[str, Tensor],
    widths: Mapping[str, int],
    distortion: Mapping[int, float],
    overhead: Mapping[str, int] | None,
    component_bytes: Callable[[str, int], int] | None,
    weights: Mapping[str, float] | None,
    protected: Collection[str],
) -> dict[str, _Plan]:
    def default_bytes(name: str, bits: int) -> int:
        return -(-widths[name] * bits // 8)

    price = component_bytes or default_bytes
    plans = {}
    for name, sigma in sigmas.items():
        squares = (weights or {}).get(name, 1.0) * sigma.double().square().cpu().numpy()
        hull = _hull([(price(name, bits), 2 * d + d**2, bits) for bits, d in distortion.items()])
        steps = len(hull) - 1
        costs = np.array([after[0] - before[0] for before, after in pairwise(hull)], dtype=np.int64)
        saved = np.array([before[1] - after[1] for before, after in pairwise(hull)])
        slopes = squares[:, None] * saved / costs  # (k, steps): falls along both
        order = np.argsort(-slopes.ravel(), kind="stable")
        owner, step = order // steps, order % steps
        rest = float(squares.sum()) * hull[-1][1]
        floor = int(name in protected and len(squares) > 0)
        ladder = Ladder(costs[step], squares[owner] * saved[step], (overhead or {}).get(name, 0), floor, rest)
        plans[name] = _Plan(ladder, owner, np.array([point[2] for point in hull[1:]], dtype=np.int64)[step])
    return plans


def _hull(points: list[tuple[int, float, int]]) -> list[tuple[int, float, int]]:
    """Lower convex hull of (bytes, error, bits) from the dropped component (0, 1, 0) on, error falling."""
    hull = [(0, 1.0, 0)]
    for point in sorted(points):
        if point[1] >= hull[-1][1]:
            continue  # costs more and is no better
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: tuple[int, float, int], b: tuple[int, float, int]) -> float:
    return (a[1] - b[1]) / (b[0] - a[0])


def _read(plans: Mapping[str, _Plan], taken: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    bits = {}
    for name, plan in plans.items():
        chosen = np.zeros(len(plan.owner) + 1, dtype=np.int64)
        np.maximum.at(chosen, plan.owner[: taken[name]], plan.bits[: taken[name]])
        kept = chosen[: int(np.count_nonzero(chosen))]
        assert (kept > 0).all() and (np.diff(kept) <= 0).all(), f"{name}: bits do not fall along the components: {kept.tolist()}"
        bits[name] = tuple(kept.tolist())
    return bits
