"""What holds for every observer: joining, resuming, determinism, errors; and each one's own numbers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fxquant.calibration.observers import (
    EmaExtent,
    Gram,
    Histogram,
    MinMax,
    Moments,
    Observer,
    QuantileSketch,
    Reservoir,
    TokenExtents,
)
from fxquant.errors import CalibrationError
from fxquant.granularity import PerChannel, PerGroup, PerToken

Make = Callable[[str], Observer]
MAKERS: dict[str, Make] = {
    "min-max": MinMax,
    "min-max per channel": lambda site: MinMax(site, PerChannel(-1)),
    "min-max per head": lambda site: MinMax(site, PerChannel(1)),
    "min-max per group": lambda site: MinMax(site, PerGroup(4)),
    "ema": lambda site: EmaExtent(site, PerChannel(-1), momentum=0.25),
    "ema of quantiles": lambda site: EmaExtent(site, momentum=0.1, quantile=0.99),
    "histogram": lambda site: Histogram(site, PerChannel(1), bins=64),
    "quantiles": lambda site: QuantileSketch(site, PerChannel(-1), mantissa_bits=3),
    "moments": lambda site: Moments(site, PerChannel(-1)),
    "reservoir of rows": lambda site: Reservoir(site, 7, seed=3),
    "reservoir of matrices": lambda site: Reservoir(site, 3, item_dims=3),
    "gram float32": Gram,
    "gram float64": lambda site: Gram(site, dtype=torch.float64),
    "tokens": TokenExtents,
}
# Sums in floating point depend on their order in the last bits; everything else is exact.
EXACT = [name for name in MAKERS if name.split()[0] not in ("ema", "moments", "gram", "tokens")]
# The items of a reservoir have indices: see test_sketches for its merge.
UNORDERED = [name for name in MAKERS if not name.startswith("reservoir")]


def batches(count: int = 5) -> list[Tensor]:
    """[batch, heads, tokens, width], of growing extent."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 4, 5, 8, generator=generator) * (1 + 3 * i) for i in range(count)]


def fed(make: Make, data: list[Tensor]) -> Observer:
    observer = make("encoder.0.fc1")
    for x in data:
        observer.observe(x)
    return observer


def same(first: Observer, second: Observer, *, exact: bool = True) -> bool:
    one, two = first.state(), second.state()
    check = torch.equal if exact else close
    return one.keys() == two.keys() and all(check(value, two[name]) for name, value in one.items())


def close(first: Tensor, second: Tensor) -> bool:
    """Within 1e-6 of the greatest magnitude."""
    if not first.numel():
        return not second.numel()
    apart = (first.to(torch.float64) - second.to(torch.float64)).abs()
    return float(apart.amax()) <= 1e-6 * float(first.abs().amax())


@pytest.mark.parametrize("name", UNORDERED)
def test_the_state_of_two_halves_merged_is_that_of_all(name: str) -> None:
    data = batches()
    left, right = fed(MAKERS[name], data[:2]), fed(MAKERS[name], data[2:])
    before = right.state()
    left.merge(right)
    assert same(left, fed(MAKERS[name], data), exact=name in EXACT)
    assert all(torch.equal(value, before[key]) for key, value in right.state().items())


@pytest.mark.parametrize("name", MAKERS)
def test_a_stopped_calibration_resumes_to_the_same_bits(name: str) -> None:
    data = batches()
    stopped, resumed = fed(MAKERS[name], data[:3]), MAKERS[name]("encoder.0.fc1")
    state = stopped.state()
    resumed.restore(state)
    for x in data[3:]:
        stopped.observe(x)
        resumed.observe(x)
    assert same(resumed, stopped)
    assert same(resumed, fed(MAKERS[name], data))


@pytest.mark.parametrize("name", MAKERS)
def test_memory_does_not_grow_with_the_data(name: str) -> None:
    sizes = [sum(value.numel() for value in fed(MAKERS[name], batches(count)).state().values()) for count in (3, 20)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("name", EXACT)
def test_the_batch_size_changes_nothing(name: str) -> None:
    data = torch.cat(batches())
    assert same(fed(MAKERS[name], [data]), fed(MAKERS[name], list(data.split(1))))


@pytest.mark.parametrize("name", sorted(set(UNORDERED) & set(EXACT)))
def test_the_order_of_batches_changes_nothing(name: str) -> None:
    data = batches()
    assert same(fed(MAKERS[name], data), fed(MAKERS[name], data[::-1]))


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(0, 4, 5, 8), r"^encoder.0.fc1: a batch of shape \(0, 4, 5, 8\) is empty"),
        (torch.full((1, 4, 5, 8), torch.nan), "^encoder.0.fc1: 160 of 160 values of a batch are not finite"),
        (torch.full((1, 4, 5, 8), -torch.inf), "^encoder.0.fc1: 160 of 160 values of a batch are not finite"),
        (torch.zeros(1, 4, 5, 8, dtype=torch.int64), "^encoder.0.fc1: values are torch.int64"),
    ],
)
def test_bad_batches_are_refused_by_name_and_leave_no_trace(name: str, x: Tensor, message: str) -> None:
    observer = fed(MAKERS[name], batches(1))
    before = observer.state()
    with pytest.raises(CalibrationError, match=message):
        observer.observe(x)
    assert all(torch.equal(value, before[key]) for key, value in observer.state().items())


@pytest.mark.parametrize("name", MAKERS)
def test_the_parts_that_a_batch_is_taken_in_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fed(MAKERS[name], batches())
    monkeypatch.setattr("fxquant.calibration.observers.base.CHUNK", 40)
    monkeypatch.setattr("fxquant.calibration.observers.gram.ROWS", 7)
    assert same(fed(MAKERS[name], batches()), whole, exact=name in EXACT)


def test_no_data_is_refused_by_name() -> None:
    with pytest.raises(CalibrationError, match=r"^fc1: no data were seen"):
        MinMax("fc1").extent()


def test_a_range_of_zero_is_refused_only_when_asked() -> None:
    observer = MinMax("fc1", PerChannel(-1))
    observer.observe(torch.tensor([[1.0, 5.0], [2.0, 5.0]]))
    assert observer.extent()[1].tolist() == [[2.0], [5.0]]
    with pytest.raises(CalibrationError, match=r"^fc1: all values of block 1 are 5, a range of zero"):
        observer.extent(allow_flat=False)


def test_batches_of_another_width_are_refused() -> None:
    observer = MinMax("fc1", PerChannel(-1))
    observer.observe(torch.zeros(2, 8))
    with pytest.raises(CalibrationError, match=r"^fc1: batches differ in shape"):
        observer.observe(torch.zeros(2, 9))


def test_tokens_have_no_static_blocks() -> None:
    with pytest.raises(CalibrationError, match=r"^fc1: tokens are as many as the data.*TokenExtents"):
        MinMax("fc1", PerToken())


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"^fc1: group size 3 does not divide 8 channels"):
        MinMax("fc1", PerGroup(3)).observe(torch.zeros(2, 8))


def test_states_and_observers_of_other_settings_are_refused() -> None:
    histogram = Histogram("fc1", bins=64)
    histogram.observe(torch.ones(3))
    with pytest.raises(CalibrationError, match=r"the state is of settings \(64.0,\), not of Histogram\(128,\)"):
        Histogram("fc1", bins=128).restore(histogram.state())
    with pytest.raises(CalibrationError, match=r"MinMax\(\) cannot take in Histogram\(64,\)"):
        MinMax("fc1").merge(histogram)


def test_half_precision_is_observed_as_float32() -> None:
    observer = MinMax("fc1")
    observer.observe(torch.tensor([-1.5, 2.25], dtype=torch.bfloat16))
    assert [float(end) for end in observer.extent()] == [-1.5, 2.25]


def test_groups_and_heads_are_blocks_over_all_rows() -> None:
    x = torch.arange(2 * 3 * 8, dtype=torch.float32).reshape(2, 3, 8)
    groups, heads = MinMax("fc1", PerGroup(4)), MinMax("qk", PerChannel(1))
    groups.observe(x)
    heads.observe(x)
    assert [end.reshape(-1).tolist() for end in groups.extent()] == [[0, 4], [43, 47]]
    assert [end.reshape(-1).tolist() for end in heads.extent()] == [[0, 8, 16], [31, 39, 47]]


def test_the_moving_average_is_its_formula() -> None:
    observer = EmaExtent("fc1", momentum=0.01)
    for top in (1.0, 3.0, 2.0):
        observer.observe(torch.tensor([-top, top]))
    # 1, then 1 + 0.01 (3 - 1) = 1.02, then 1.02 + 0.01 (2 - 1.02) = 1.0298
    low, high = observer.extent()
    assert float(high) == pytest.approx(1.0298)
    assert float(low) == pytest.approx(-1.0298)


def test_the_moving_average_of_quantiles_starts_with_those_of_the_first_batch() -> None:
    x = torch.arange(101.0)
    observer = EmaExtent("fc1", quantile=0.95)
    observer.observe(x)
    assert [float(end) for end in observer.extent()] == pytest.approx([5, 95])


def test_moments_are_those_of_all_the_data() -> None:
    data = batches()
    observer = Moments("fc1", PerChannel(-1))
    for x in data:
        observer.observe(x + 100)
    rows = (torch.cat(data).reshape(-1, 8) + 100).to(torch.float64)
    assert torch.allclose(observer.mean[:, 0], rows.mean(0), rtol=1e-12)
    assert torch.allclose(observer.variance[:, 0], rows.var(0, correction=0), rtol=1e-9)
    assert torch.allclose(observer.mean_square[:, 0], rows.square().mean(0), rtol=1e-12)
    assert torch.allclose(observer.magnitude[:, 0], rows.abs().mean(0), rtol=1e-12)
    assert torch.equal(observer.absmax[:, 0], rows.abs().amax(0).to(torch.float32))
    assert observer.count.tolist() == [[300]] * 8


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_the_gram_matrix_is_that_of_all_rows(dtype: torch.dtype, tolerance: float) -> None:
    rows = torch.randn(3000, 16, generator=torch.Generator().manual_seed(0)) + 2
    observer = Gram("fc1", dtype=dtype)
    for x in rows.split(700):
        observer.observe(x)
    wide = rows.to(torch.float64)
    assert observer.gram.dtype == dtype
    assert observer.rows == 3000
    assert torch.allclose(observer.gram.to(torch.float64), wide.T @ wide, rtol=tolerance)
    assert torch.allclose(observer.mean.to(torch.float64), wide.mean(0), rtol=tolerance)


def test_token_extents_have_zero_among_them_and_the_stated_error() -> None:
    x = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0)).abs() + 0.5
    observer = TokenExtents("fc1")
    for part in x.split(900):
        observer.observe(part)
    high = x.amax(1)
    assert observer.tokens == 4000
    assert observer.mean_range_square == pytest.approx(float(high.square().mean()), rel=1e-6)
    low, found = observer.quantile(0.99)
    assert float(low) == 0
    assert float(found) == pytest.approx(float(high.quantile(0.99)), rel=2.0**-8)
