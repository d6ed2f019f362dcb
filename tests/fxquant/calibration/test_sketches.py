"""Quantiles, histograms and reservoirs: the stated error bounds and what they depend on."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.calibration.observers import Histogram, QuantileSketch, Reservoir, Samples
from fxquant.errors import CalibrationError
from fxquant.granularity import PerChannel

FRACTIONS = (0.0, 1e-5, 0.001, 0.1, 0.5, 0.9, 0.999, 0.99999, 1.0)
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def heavy_tail() -> Tensor:
    """20000 values, a few of them a hundred times the others."""
    x = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    x[::1999] *= 100
    return x


def neighbours(x: Tensor, fraction: float) -> tuple[float, float]:
    """The order statistics between which a quantile lies."""
    ordered, place = x.sort().values, fraction * (len(x) - 1)
    return float(ordered[int(np.floor(place))]), float(ordered[int(np.ceil(place))])


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_exact_quantiles_are_those_of_numpy(fraction: float) -> None:
    x = heavy_tail()
    found = Samples.of("fc1", x).quantile(fraction)
    assert float(found) == pytest.approx(np.quantile(x.numpy().astype(np.float64), fraction), rel=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 7])
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_a_sketched_quantile_has_the_stated_relative_error(bits: int, fraction: float) -> None:
    x = heavy_tail()
    sketch = QuantileSketch("fc1", mantissa_bits=bits)
    for part in x.split(3000):
        sketch.observe(part)
    lower, upper = neighbours(x, fraction)
    bound = sketch.relative_error * max(abs(lower), abs(upper)) + 2.0**-32
    exact = np.quantile(x.numpy().astype(np.float64), fraction)
    assert abs(float(sketch.quantile(fraction)) - exact) <= bound * (1 + 1e-6)
    assert sketch.relative_error == 2.0 ** -(bits + 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=40), st.floats(0, 1))
def test_the_bound_holds_for_any_floats(values: list[float], fraction: float) -> None:
    x = torch.tensor(values)
    sketch = QuantileSketch("fc1", mantissa_bits=3)
    sketch.observe(x)
    lower, upper = neighbours(x, fraction)
    bound = sketch.relative_error * max(abs(lower), abs(upper)) + 2.0**-32
    found = float(sketch.quantile(fraction))
    assert lower - bound * 1.001 <= found <= upper + bound * 1.001


def test_the_extremes_of_a_sketch_are_exact() -> None:
    x = heavy_tail()
    sketch = QuantileSketch("fc1", mantissa_bits=0)
    sketch.observe(x)
    assert float(sketch.quantile(0)) == float(x.amin())
    assert float(sketch.quantile(1)) == float(x.amax())


@settings(max_examples=60, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=40))
def test_every_value_is_within_half_a_bin_of_its_centre(values: list[float]) -> None:
    x = torch.tensor(values)
    histogram = Histogram("fc1", bins=64)
    for part in x.split(7):
        histogram.observe(part)
    samples, width = histogram.samples(), float(histogram.width)
    assert samples.counts is not None
    centres = samples.values[0].repeat_interleave(samples.counts[0]).to(torch.float64)
    assert len(centres) == len(x)
    assert float((centres - x.sort().values.to(torch.float64)).abs().amax()) <= 0.5 * width * (1 + 1e-6)
    assert width <= max(4 * float(x.abs().amax()) / 64, 2.0**-126)


def test_the_range_doubles_and_nothing_is_lost() -> None:
    histogram = Histogram("fc1", bins=8)
    histogram.observe(torch.tensor([0.1, 0.9, -0.1]))
    assert float(histogram.width) == 0.25
    histogram.observe(torch.tensor([3.5]))
    assert float(histogram.width) == 1.0
    assert histogram.state()["counts"].tolist() == [[0, 0, 0, 1, 2, 0, 0, 1]]
    assert histogram.magnitudes.tolist() == [[3, 0, 0, 1]]


def test_channels_have_bins_of_their_own() -> None:
    histogram = Histogram("fc1", PerChannel(-1), bins=8)
    histogram.observe(torch.tensor([[0.1, 100.0], [0.9, -3.0]]))
    assert histogram.width.tolist() == [[0.25], [32.0]]


def test_a_histogram_of_zeros_counts_them() -> None:
    histogram = Histogram("fc1", bins=8)
    histogram.observe(torch.zeros(5))
    histogram.observe(torch.ones(2))
    assert histogram.state()["counts"].tolist() == [[0, 0, 0, 0, 5, 0, 2, 0]]


@pytest.mark.parametrize("bins", [0, 2, 100])
def test_a_number_of_bins_that_is_no_power_of_two_is_refused(bins: int) -> None:
    with pytest.raises(CalibrationError, match=f"not {bins}"):
        Histogram("fc1", bins=bins)


def rows(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.float32)[:, None].expand(-1, 3).contiguous()


def test_a_reservoir_keeps_everything_while_it_fits() -> None:
    reservoir = Reservoir("fc1", 10)
    reservoir.observe(rows(4))
    assert torch.equal(reservoir.items, rows(4))


def test_a_reservoir_of_another_seed_keeps_other_rows() -> None:
    kept = []
    for seed in (0, 0, 1):
        reservoir = Reservoir("fc1", 20, seed)
        reservoir.observe(rows(1000))
        kept.append(reservoir.items[:, 0].tolist())
    assert kept[0] == kept[1] != kept[2]
    assert kept[0] == sorted(set(kept[0]))


def test_a_reservoir_is_uniform_over_the_stream() -> None:
    hits = torch.zeros(100)
    for seed in range(400):
        reservoir = Reservoir("fc1", 10, seed)
        for part in rows(100).split(30):
            reservoir.observe(part)
        hits[reservoir.items[:, 0].to(torch.int64)] += 1
    # Each row is kept with probability 0.1: 40 ± 6 of 400 times. Five standard deviations for any row, three for thirds.
    assert float((hits - 40).abs().amax()) < 30
    thirds = hits[:99].reshape(3, 33).sum(1) / 33
    assert float((thirds - 40).abs().amax()) < 4


def test_reservoirs_of_one_seed_keep_paired_rows() -> None:
    one, two = Reservoir("in", 16, 5), Reservoir("out", 16, 5)
    one.observe(rows(200))
    for part in (2 * rows(200)).split(70):
        two.observe(part)
    assert torch.equal(2 * one.items, two.items)


def test_merged_reservoirs_keep_the_least_priorities_of_both() -> None:
    streams = []
    for stream in (0, 1):
        reservoir = Reservoir("fc1", 8, stream=stream)
        reservoir.observe(rows(50) + 100 * stream)
        streams.append(reservoir)
    states = [stream.state() for stream in streams]
    streams[0].merge(streams[1])
    priorities = torch.cat([state["priority"] for state in states]).sort().values[:8]
    assert torch.equal(streams[0].state()["priority"], priorities)
    assert streams[0].seen == 100
    assert len(streams[0].items) == 8


def test_reservoirs_of_one_stream_cannot_be_merged() -> None:
    one, two = Reservoir("fc1", 8), Reservoir("fc1", 8)
    one.observe(rows(50))
    two.observe(rows(50))
    with pytest.raises(CalibrationError, match="two reservoirs of one stream number"):
        one.merge(two)


def test_items_of_another_shape_are_refused() -> None:
    reservoir = Reservoir("qk", 8, item_dims=2)
    reservoir.observe(torch.zeros(2, 5, 4))
    with pytest.raises(CalibrationError, match=r"^qk: items differ in shape: \(5, 4\), then \(6, 4\)"):
        reservoir.observe(torch.zeros(2, 6, 4))
