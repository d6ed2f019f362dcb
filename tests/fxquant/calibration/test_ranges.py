"""Range searches: the worked examples of vit-quantizers section 2 and 16, ties, weights, errors."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from fxquant.calibration.observers import EmaExtent, Histogram, QuantileSketch, Samples
from fxquant.calibration.searches import (
    Candidates,
    Choice,
    TensorMetric,
    choose,
    from_extent,
    half_step_start,
    min_max,
    mse_grid,
    mse_percentile,
    omse,
    percentile,
    scan_formats,
)
from fxquant.calibration.searches.metric import range_candidates
from fxquant.calibration.searches.ranges import IAS_WEIGHT_FRACTIONS, REPQ_FRACTIONS
from fxquant.errors import CalibrationError
from fxquant.formats import Uniform
from fxquant.granularity import PerChannel, PerGroup, PerTensor

X = torch.tensor([-0.9, -0.35, 0, 0.12, 0.5, 1.31, 2.1])
OUTLIER = torch.cat([torch.linspace(-1, 1, 41), torch.tensor([6.0])])


def values(choice: Choice) -> dict[str, float]:
    return {name: float(value) for name, value in choice.qparams.items()}


def test_min_max_is_the_worked_example() -> None:
    choice = min_max(Samples.of("fc1", X), Uniform(4))
    assert values(choice) == pytest.approx({"scale": 0.2, "zero_point": 4})
    assert choice.fake_quant(X, PerTensor()).tolist() == pytest.approx([-0.8, -0.4, 0, 0.2, 0.4, 1.4, 2.0])


def test_symmetric_min_max_without_and_with_half_a_step_of_clipping() -> None:
    form, samples = Uniform(4, is_symmetric=True), Samples.of("fc1", X)
    assert values(min_max(samples, form)) == pytest.approx({"scale": 0.3})
    start = half_step_start(samples, form)
    assert float(start["scale"]) == pytest.approx(0.28)
    assert form.fake_quant(X[None], start)[0].tolist() == pytest.approx([-0.84, -0.28, 0, 0, 0.56, 1.4, 1.96])


def test_omse_is_the_worked_example() -> None:
    samples = Samples.of("fc1", OUTLIER)
    before, choice = min_max(samples, Uniform(4)), omse(samples, Uniform(4))
    assert values(before) == pytest.approx({"scale": 0.466667, "zero_point": 2}, rel=1e-5)
    assert float(before.loss) == pytest.approx(1.65873e-2, rel=1e-5)
    assert values(choice) == pytest.approx({"scale": 0.452667, "zero_point": 2}, rel=1e-5)
    assert float(choice.loss) == pytest.approx(1.53880e-2, rel=1e-5)


def test_a_percentile_can_be_worse_than_min_max() -> None:
    choice = percentile(Samples.of("fc1", OUTLIER), Uniform(4), 0.95)
    assert float(choice.loss) == pytest.approx(0.6009, rel=1e-3)


@pytest.mark.parametrize("fractions", [REPQ_FRACTIONS, IAS_WEIGHT_FRACTIONS])
def test_the_percentile_with_the_least_error_is_chosen_for_every_block(fractions: tuple[float, ...]) -> None:
    x = torch.randn(5, 4000, generator=torch.Generator().manual_seed(0))
    x[:, ::500] *= torch.tensor([1.0, 3.0, 10.0, 30.0, 100.0])[:, None]
    samples = Samples.of("fc1", x, PerChannel(0))
    choice = mse_percentile(samples, Uniform(4), fractions)
    alone = torch.stack([percentile(samples, Uniform(4), fraction).loss for fraction in fractions])
    assert torch.equal(choice.loss, alone.amin(0))
    for block in range(5):
        row = Samples.of("fc1", x[block])
        assert values(mse_percentile(row, Uniform(4), fractions)) == {k: float(v[block]) for k, v in choice.qparams.items()}


@pytest.mark.parametrize("search", [mse_percentile, omse, mse_grid])
def test_a_search_is_no_worse_than_its_first_candidate_and_deterministic(
    search: Callable[[Samples, Uniform], Choice],
) -> None:
    samples = Samples.of("fc1", torch.randn(3, 5000, generator=torch.Generator().manual_seed(2)), PerChannel(0))
    first, second = search(samples, Uniform(3)), search(samples, Uniform(3))
    assert all(torch.equal(value, second.qparams[name]) for name, value in first.qparams.items())
    if search is not mse_percentile:
        assert bool((first.loss <= min_max(samples, Uniform(3)).loss).all())


def test_the_two_sided_grid_helps_where_one_end_has_the_outliers() -> None:
    x = torch.rand(4000, generator=torch.Generator().manual_seed(0)) - 1
    x[::400] = 1.5
    samples = Samples.of("fc1", x)
    assert float(mse_grid(samples, Uniform(3), least=0.1).loss) < float(omse(samples, Uniform(3)).loss)


def test_ties_keep_the_first_candidate_and_the_first_format() -> None:
    samples = Samples.of("fc1", torch.zeros(1, 10))
    ends = torch.tensor([3.0, 1.0, 2.0])[:, None, None]
    choice = choose(TensorMetric(samples), [range_candidates(Uniform(width), -ends, ends) for width in (4, 8)])
    assert choice.format == Uniform(4)
    assert values(choice)["scale"] == pytest.approx(6 / 15)


def test_of_several_formats_the_best_over_all_blocks_is_taken() -> None:
    samples = Samples.of("fc1", torch.rand(4, 100, generator=torch.Generator().manual_seed(0)), PerChannel(0))
    choice = scan_formats(TensorMetric(samples), samples, [Uniform(4, is_symmetric=True), Uniform(4), Uniform(2)])
    assert choice.format == Uniform(4)
    assert choice.loss.shape == (4,)


def test_groups_of_a_weight_have_qparams_of_their_own() -> None:
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    choice = omse(Samples.of("fc1", weight, PerGroup(4)), Uniform(4))
    assert choice.qparams["scale"].shape == (6, 1)
    for row in range(3):
        alone = omse(Samples.of("fc1", weight[row, 4:]), Uniform(4))
        assert torch.equal(alone.qparams["scale"], choice.qparams["scale"][2 * row + 1 : 2 * row + 2])
    assert choice.fake_quant(weight, PerGroup(4)).shape == weight.shape
    with pytest.raises(CalibrationError, match=r"^fc1: group size 3 does not divide 8 channels"):
        Samples.of("fc1", weight, PerGroup(3))


def test_no_finite_loss_is_refused_by_name() -> None:
    samples = Samples.of("encoder.fc1", torch.ones(1, 4))
    broken = Candidates(Uniform(4, is_symmetric=True), {"scale": torch.full((2, 1, 1), torch.nan)})
    with pytest.raises(CalibrationError, match=r"^encoder.fc1: no candidate of a search has a finite loss"):
        choose(TensorMetric(samples), [broken])


@pytest.mark.parametrize("x", [torch.zeros(0), torch.tensor([1.0, torch.inf]), torch.tensor([torch.nan])])
def test_searches_refuse_data_that_are_empty_or_not_finite(x: Tensor) -> None:
    with pytest.raises(CalibrationError, match=r"^fc1: a search needs finite values"):
        Samples.of("fc1", x)


def test_a_range_of_zero_is_refused_when_asked() -> None:
    samples = Samples.of("fc1", torch.ones(2, 4), PerChannel(0))
    assert min_max(samples, Uniform(4)).loss.tolist() == pytest.approx([0, 0], abs=1e-12)
    with pytest.raises(CalibrationError, match=r"^fc1: all values of block 0 are 1"):
        min_max(samples, Uniform(4), allow_flat=False)


def test_the_chunk_size_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(6, 700, generator=torch.Generator().manual_seed(0))
    samples = Samples.of("fc1", x, PerChannel(0))
    whole = omse(samples, Uniform(4))
    monkeypatch.setattr("fxquant.calibration.observers.samples.CHUNK", 128)
    parts = omse(samples, Uniform(4))
    assert torch.equal(whole.qparams["scale"], parts.qparams["scale"])
    assert torch.allclose(whole.loss, parts.loss, rtol=1e-12)


@pytest.mark.parametrize("search", [min_max, mse_percentile, omse])
def test_searches_on_a_sketch_come_close_to_those_on_the_data(search: Callable[[Samples, Uniform], Choice]) -> None:
    x = torch.randn(40000, generator=torch.Generator().manual_seed(0))
    exact = search(Samples.of("fc1", x), Uniform(4))
    for observer in (Histogram("fc1"), QuantileSketch("fc1")):
        for part in x.split(9000):
            observer.observe(part)
        found = search(observer.samples(), Uniform(4))
        assert found.qparams["scale"].item() == pytest.approx(exact.qparams["scale"].item(), rel=0.02)
        assert found.loss.item() == pytest.approx(exact.loss.item(), rel=0.02)


def test_a_moving_average_becomes_qparams() -> None:
    x = torch.tensor([-1.0, 2.0])
    observer = EmaExtent("fc1")
    observer.observe(x)
    assert values(from_extent(Samples.of("fc1", x), Uniform(2), *observer.extent())) == {"scale": 1, "zero_point": 1}


@pytest.mark.parametrize(("bits", "plain", "clipped"), [(4, (38.0, 7.51), (25.9, 5.12)), (3, (87.4, 16.99), (52.8, 10.52))])
def test_uniform_codes_of_synthetic_attention(bits: int, plain: tuple[float, float], clipped: tuple[float, float]) -> None:
    attention, v = synthetic_attention()
    samples, form = Samples.of("pv", attention), Uniform(bits)
    for choice, (error, output) in ((min_max(samples, form), plain), (omse(samples, form), clipped)):
        difference = choice.fake_quant(attention, PerTensor()) - attention
        assert float(choice.loss) * 1e6 == pytest.approx(error, rel=0.01)
        assert float((difference @ v).square().mean()) * 1e3 == pytest.approx(output, rel=0.01)


def synthetic_attention() -> tuple[Tensor, Tensor]:
    """Section 16: 256 rows of softmax(2 N(0, 1)) of 197 tokens, and 64 values a token."""
    generator = np.random.default_rng(0)
    logits, v = 2 * generator.standard_normal((256, 197)), generator.standard_normal((197, 64))
    attention = torch.softmax(torch.from_numpy(logits), -1)
    return attention.to(torch.float32), torch.from_numpy(v).to(torch.float32)
