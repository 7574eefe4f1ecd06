"""Distances between feature sets: against torchmetrics, against dense algebra, on Gaussians whose distance is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lora_compress import EvaluationError
from lora_compress.evaluation.frechet import FeatureStatistics, frechet_distance, frechet_infinity
from lora_compress.evaluation.intervals import (
    Measurement,
    _student_quantile,
    bootstrap_interval,
    interval_of,
    jackknife,
    jackknife_interval,
    same_size_floor,
)
from lora_compress.evaluation.kernels import clip_mmd, kernel_distance


def features(count: int, width: int, seed: int = 0, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    """Correlated features with a falling spectrum."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99)) / width**0.5
    spread = (1.0 + torch.arange(width)).pow(-0.5) * scale
    return (torch.randn(count, width, generator=random) * spread) @ mixing + shift


def dense_frechet(first: Tensor, second: Tensor) -> float:
    """The formula as written, by symmetric roots of dense covariances."""
    first, second = first.double(), second.double()
    one, two = torch.cov(first.T), torch.cov(second.T)
    values, vectors = torch.linalg.eigh(one)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    crossed = torch.linalg.eigvalsh(root @ two @ root).clamp_min(0).sqrt().sum()
    return float((first.mean(0) - second.mean(0)).square().sum() + one.trace() + two.trace() - 2 * crossed)


@pytest.mark.parametrize(("counts", "width"), [((300, 400), 16), ((40, 50), 64), ((40, 300), 64), ((2, 2), 8), ((64, 64), 64)])
def test_frechet_distance_is_the_formula(counts: tuple[int, int], width: int) -> None:
    first, second = features(counts[0], width, 1), features(counts[1], width, 2, shift=0.1, scale=1.3)
    assert frechet_distance(first, second) == pytest.approx(dense_frechet(first, second), rel=1e-6)


def test_frechet_distance_is_that_of_torchmetrics() -> None:
    pytest.importorskip("torchmetrics")
    from torchmetrics.image.fid import _compute_fid

    for width, counts in ((24, (500, 700)), (64, (40, 50))):
        first, second = features(counts[0], width, 1).double(), features(counts[1], width, 2, shift=0.1, scale=1.3).double()
        theirs = float(_compute_fid(first.mean(0), torch.cov(first.T), second.mean(0), torch.cov(second.T)))
        assert frechet_distance(first, second) == pytest.approx(theirs, rel=1e-6)


def test_frechet_distance_is_that_of_torch_fidelity() -> None:
    metric_fid = pytest.importorskip("torch_fidelity.metric_fid")
    first, second = features(400, 24, 1).double(), features(300, 24, 2, shift=0.1).double()
    statistics = [{"mu": f.mean(0).numpy(), "sigma": torch.cov(f.T).numpy()} for f in (first, second)]
    theirs = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(first, second) == pytest.approx(theirs, rel=1e-6)


def test_frechet_distance_of_one_set_and_itself_is_zero_in_any_order() -> None:
    for count, width in ((20, 64), (200, 16)):
        one = features(count, width)
        assert frechet_distance(one, one.flip(0)) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(("count", "width"), [(90, 16), (30, 64)])
def test_statistics_do_not_depend_on_the_batches(count: int, width: int) -> None:
    whole = features(count, width, shift=3.0)
    at_once, updated = FeatureStatistics.of(whole), FeatureStatistics.of(iter(whole.split(7)))
    assert updated.count == at_once.count == count
    assert len(updated.factor) <= max(width, count)
    torch.testing.assert_close(updated.mean, at_once.mean)
    torch.testing.assert_close(updated.factor.T @ updated.factor, at_once.factor.T @ at_once.factor)
    assert frechet_distance(updated, features(50, width, 5)) == pytest.approx(frechet_distance(whole, features(50, width, 5)))


def test_infinitely_many_pictures_have_the_true_distance() -> None:
    """Two Gaussians with unit covariance and means 0.5 apart: the distance is 0.25, that of 300 pictures much more."""
    width, true = 32, 0.25
    random = torch.Generator().manual_seed(0)
    shift = torch.zeros(width)
    shift[0] = true**0.5
    first, second = torch.randn(1000, width, generator=random), torch.randn(1000, width, generator=random) + shift
    plain, extrapolated = frechet_distance(first, second), frechet_infinity(first, second)
    assert plain - true > 0.2
    assert abs(extrapolated - true) < 0.35 * (plain - true)


def test_kernel_distance_is_that_of_torchmetrics() -> None:
    pytest.importorskip("torchmetrics")
    from torchmetrics.image.kid import poly_mmd

    first, second = features(60, 24, 1).double(), features(60, 24, 2, shift=0.2).double()
    assert kernel_distance(first, second) == pytest.approx(float(poly_mmd(first, second)), rel=1e-6)


def test_kernel_distance_is_that_of_torch_fidelity() -> None:
    metric_kid = pytest.importorskip("torch_fidelity.metric_kid")
    first, second = features(60, 24, 1).double(), features(60, 24, 2, shift=0.2).double()
    found = metric_kid.kid_features_to_metric(first, second, kid_subsets=1, kid_subset_size=60, verbose=False)
    assert kernel_distance(first, second) == pytest.approx(found["kernel_inception_distance_mean"], rel=1e-6)


def double_sum(kernel: object, first: Tensor, second: Tensor) -> float:
    """The unbiased squared MMD, a pair of pictures at a time."""
    n, m = len(first), len(second)
    within = [
        sum(kernel(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j) / (len(s) * (len(s) - 1))  # type: ignore[operator]
        for s in (first, second)
    ]
    across = sum(kernel(x, y) for x in first for y in second) / (n * m)  # type: ignore[operator]
    return float(within[0] + within[1] - 2 * across)


def test_kernel_distances_are_sums_over_pairs() -> None:
    first, second = features(7, 5, 1).double(), features(9, 5, 2, shift=0.3).double()
    cubic = double_sum(lambda x, y: (x @ y / 5 + 1) ** 3, first, second)
    assert kernel_distance(first, second) == pytest.approx(cubic, rel=1e-9)
    units = [side / side.norm(dim=1, keepdim=True) for side in (first, second)]
    gauss = double_sum(lambda x, y: math.exp(-float((x - y).square().sum()) / 200), *units)
    assert clip_mmd(first, second) == pytest.approx(1000 * gauss, rel=1e-6)
    kernel = torch.exp(-(torch.cdist(torch.cat(units), torch.cat(units)) ** 2) / 200)
    biased = kernel[:7, :7].mean() + kernel[7:, 7:].mean() - 2 * kernel[:7, 7:].mean()  # as the paper's code
    assert clip_mmd(first, second, biased=True) == pytest.approx(1000 * float(biased), rel=1e-6)


def test_kernel_distances_have_no_bias_and_frechet_has() -> None:
    """Pairs of 12 pictures of one law: the mean of KID and CMMD is zero within its error, of FID it is far from that."""
    rows = []
    for seed in range(60):
        pair = features(12, 16, 1000 + seed), features(12, 16, 5000 + seed)
        rows.append([measure(*pair) for measure in (kernel_distance, clip_mmd, frechet_distance)])
    table = torch.tensor(rows, dtype=torch.float64)
    scores = table.mean(0) / (table.std(0) / len(rows) ** 0.5)
    assert scores[0].abs() < 3 and scores[1].abs() < 3
    assert scores[2] > 20


def test_subsets_estimate_the_whole() -> None:
    first, second = features(240, 8, 1), features(240, 8, 2, shift=0.3)
    whole, parts = kernel_distance(first, second), kernel_distance(first, second, subsets=60, subset_size=120)
    assert parts == pytest.approx(whole, rel=0.1)
    assert parts != whole
    assert parts == kernel_distance(first, second, subsets=60, subset_size=120)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance, clip_mmd])
@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (torch.ones(1, 4), torch.ones(5, 4), "1 picture: a distance needs 2"),
        (torch.ones(0, 4), torch.ones(5, 4), "0 pictures|no features"),
        (torch.randn(5, 3), torch.randn(5, 4), "3 and 4 wide"),
        (torch.full((5, 4), math.nan), torch.randn(5, 4), "NaN or infinity"),
        (torch.randn(5, 4, 2), torch.randn(5, 4), "a matrix"),
    ],
)
def test_what_cannot_be_measured_is_refused(distance, first: Tensor, second: Tensor, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(EvaluationError, match=message):
        distance(first, second)


def test_too_few_pictures_are_not_extrapolated() -> None:
    with pytest.raises(EvaluationError, match="32 or more"):
        frechet_infinity(features(31, 16), features(100, 16))


@pytest.mark.parametrize(("distance", "true"), [(kernel_distance, None), (frechet_distance, 1.0)])
def test_jackknife_intervals_hold_the_value_that_many_pictures_have(distance, true: float | None) -> None:  # type: ignore[no-untyped-def]
    """95 % is asked for; of 40 intervals at least 34 hold it, and they are no wider than they need to be."""
    width, held, widths, values = 4, 0, [], []
    shift = torch.full((width,), 0.5)
    many = torch.randn(2, 1500, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    true = true or distance(many[0], many[1] + shift)
    for seed in range(40):
        pair = torch.randn(2, 200, width, generator=torch.Generator().manual_seed(100 + seed), dtype=torch.float64)
        first, second = pair[0], pair[1] + shift
        values.append(distance(first, second))
        low, high = jackknife_interval(distance, first, second, value=values[-1], seed=seed)
        held += low <= true <= high
        widths.append(high - low)
    assert held >= 34
    assert 2 < sum(widths) / len(widths) / float(torch.tensor(values).std()) < 8  # 4 would be exact


def test_bootstrap_intervals_of_a_mean_are_the_normal_ones() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(3)) * 2 + 5
    low, high = bootstrap_interval(values)
    error = float(values.std()) / 20
    assert low == pytest.approx(float(values.mean()) - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(float(values.mean()) + 1.96 * error, abs=0.2 * error)
    assert (low, high) == bootstrap_interval(values)


def test_bootstrap_intervals_of_a_ratio_hold_it() -> None:
    parts = torch.rand(300, 2, generator=torch.Generator().manual_seed(3)) * torch.tensor([1.0, 4.0])
    low, high = bootstrap_interval(parts, lambda means: (means[:, 0] / means[:, 1]).sqrt())
    assert low < 0.5 < high
    assert high - low < 0.1


@pytest.mark.parametrize(("freedom", "value"), [(1, 12.706), (2, 4.303), (3, 3.182), (9, 2.262), (19, 2.093), (math.inf, 1.960)])
def test_students_quantiles_are_those_of_the_tables(freedom: float, value: float) -> None:
    assert _student_quantile(0.975, freedom) == pytest.approx(value, rel=0.01)


def test_the_floor_is_what_two_sets_of_one_source_are_apart() -> None:
    pool = features(400, 16, 7)
    floor = same_size_floor(frechet_distance, pool, 100)
    fresh = frechet_distance(features(100, 16, 8), features(100, 16, 9))
    assert floor == pytest.approx(fresh, rel=0.3)
    assert same_size_floor(frechet_distance, pool, 25) > 2 * floor
    with pytest.raises(EvaluationError, match="the floor at 201 needs 402"):
        same_size_floor(frechet_distance, pool, 201)


def test_the_interval_of_a_mean_is_the_textbook_s() -> None:
    """20 pictures, each a group: the jackknife of a mean is t s / sqrt(n) exactly."""
    values = features(40, 1, seed=5)[:, 0].double()

    def mean_of(first: Tensor, second: Tensor) -> float:
        return float(first.mean() - second.mean())

    first, second = values[:20].unsqueeze(1), torch.zeros(8, 1, dtype=torch.float64)
    (one_out, other), value = jackknife(mean_of, first.repeat_interleave(2, dim=0), second), mean_of(first, second)
    assert len(one_out) == 20 and set(other) == {value}  # two pictures a group, in random order
    exact = tuple(float((first.sum() - one) / 19) for one in first)
    low, high = interval_of(lambda values: values[0], [Measurement(value, (exact,))])
    reach = 2.093024 * float(first.std()) / math.sqrt(20)  # Student's t of 19 degrees of freedom
    assert (low, high) == pytest.approx((value - reach, value + reach), rel=1e-4)


def test_common_errors_cancel_and_independent_ones_add() -> None:
    replicates = ((1.0, 2.0, 3.0, 4.0), (2.5, 2.5, 2.5, 2.5))
    same = Measurement(2.5, replicates)
    assert interval_of(lambda values: values[0] - values[1], [same, same]) == (0.0, 0.0)
    other = Measurement(2.5, ((1.0, 2.0, 3.0, 4.0, 2.5), replicates[1]))  # other groups: other pictures
    alone = interval_of(lambda values: values[0], [same])
    both = interval_of(lambda values: values[0] - values[1], [same, other])
    assert both[1] - both[0] > alone[1] - alone[0]
    exact, rough = Measurement(3.0), Measurement(3.0, deviation=2.0)
    assert interval_of(lambda values: values[0], [exact]) == (3.0, 3.0)
    assert interval_of(lambda values: 2 * values[0] + values[1], [rough, exact]) == pytest.approx(
        (9 - 1.96 * 4, 9 + 1.96 * 4), rel=1e-3
    )
    assert interval_of(lambda values: values[0], [Measurement(1.0, deviation=math.inf)]) == (-math.inf, math.inf)
    assert interval_of(lambda values: values[0], [Measurement(1.0, ((), ()))]) == (-math.inf, math.inf)
