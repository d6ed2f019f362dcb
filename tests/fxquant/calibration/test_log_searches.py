"""Searches of SULQ, twin uniform, AdaLog, TanQ and log-√2 codes: worked examples of vit-quantizers sections 7 and 16."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fxquant.calibration.observers import Samples
from fxquant.calibration.searches import (
    Choice,
    Product,
    TensorMetric,
    adalog_base,
    adalog_scale_and_base,
    min_max,
    mse_percentile,
    scan_qparam,
    sulq_shift,
    twin_ratio,
    twin_split,
)
from fxquant.calibration.searches.adalog import positive_quantile
from fxquant.calibration.searches.metric import Candidates
from fxquant.calibration.searches.ranges import REPQ_FRACTIONS
from fxquant.formats import AdaLog, Format, Log2, LogSqrt2, Sulq, TanQ, TwinGelu, TwinSoftmax, Uniform
from fxquant.formats.adalog import BASES, GELU_SHIFT
from fxquant.formats.sulq import SHIFTS
from fxquant.formats.tanq import ANGLES
from fxquant.formats.twin_uniform import RATIOS
from fxquant.granularity import PerChannel, PerTensor

A = torch.tensor([1, 0.7, 0.5, 0.3, 0.1, 0.02, 1e-3, 0])


def synthetic_attention() -> tuple[Tensor, Tensor]:
    """Section 16: 256 rows of softmax(2 N(0, 1)) of 197 tokens, and 64 values a token."""
    generator = np.random.default_rng(0)
    logits, v = 2 * generator.standard_normal((256, 197)), generator.standard_normal((197, 64))
    attention = torch.softmax(torch.from_numpy(logits), -1)
    return attention.to(torch.float32), torch.from_numpy(v).to(torch.float32)


def gelu_outputs(*shape: int) -> Tensor:
    return torch.nn.functional.gelu(torch.randn(*shape, generator=torch.Generator().manual_seed(0)))


def searched(format: Format, samples: Samples) -> tuple[Choice, float | None]:
    """The choice of the format's own search, with the searched number; splits of twin uniform codes up to the width, where the
    format is the published one."""
    metric, one = TensorMetric(samples), torch.ones(1, 1)
    if isinstance(format, AdaLog):
        choice = adalog_base(metric, format, one)
        return choice, float(choice.qparams["base"])
    if isinstance(format, Sulq):
        choice = sulq_shift(samples, format)
        return choice, float(choice.qparams["shift"])
    if isinstance(format, TwinSoftmax):
        choice = twin_split(metric, format, 1, range(format.width))
        return choice, float(choice.qparams["split"])
    if isinstance(format, TanQ):
        choice = scan_qparam(metric, format, format.fit(samples.values), "angle", ANGLES)
        return choice, float(choice.qparams["angle"])
    return min_max(samples, format), None


@pytest.mark.parametrize(
    ("format", "best", "error", "output"),
    [
        (Log2(4), None, 18.2, 3.58),
        (Log2(3), None, 20.3, 4.00),
        (LogSqrt2(4), None, 5.87, 1.16),
        (LogSqrt2(3), None, 73.0, 14.34),
        (AdaLog(4), 21, 6.47, 1.25),
        (AdaLog(3), 33, 19.6, 3.87),
        (Sulq(4), 0.005, 20.5, 4.06),
        (Sulq(3), 0.01, 32.4, 6.46),
        (TwinSoftmax(4), 3, 13.6, 2.69),
        (TwinSoftmax(3), 2, 60.6, 11.79),
        (TanQ(4), 1.40, 8.30, 1.63),
        (TanQ(3), 1.35, 33.4, 6.54),
    ],
    ids=lambda value: value.name if isinstance(value, Format) else "",
)
def test_the_synthetic_table(format: Format, best: float | None, error: float, output: float) -> None:
    attention, v = synthetic_attention()
    choice, found = searched(format, Samples.of("pv", attention))
    difference = choice.fake_quant(attention, PerTensor()) - attention
    assert found == (None if best is None else pytest.approx(best))
    assert float(choice.loss) * 1e6 == pytest.approx(error, rel=0.01)
    assert float((difference @ v).square().mean()) * 1e3 == pytest.approx(output, rel=0.01)


def test_splits_beyond_the_width_are_better_than_published_as_the_gap_between_the_ranges_is_closed() -> None:
    attention, _ = synthetic_attention()
    choice = twin_split(TensorMetric(Samples.of("pv", attention)), TwinSoftmax(3), 1)
    assert float(choice.qparams["split"]) == 3
    assert float(choice.loss) < 60.6e-6


@pytest.mark.parametrize(("shift", "error"), [(0.01, 6.0177e-3), (0.001, 1.6201e-2), (0.05, 1.0981e-2)])
def test_the_worked_example_of_sulq(shift: float, error: float) -> None:
    samples = Samples.of("pv", A)
    assert float(sulq_shift(samples, Sulq(3), (shift,)).loss) == pytest.approx(error, rel=1e-4)
    assert float(sulq_shift(samples, Sulq(3), (0.001, 0.01, 0.05)).qparams["shift"]) == pytest.approx(0.01)


def test_sulq_shifts_are_searched_for_every_head_and_lo_and_step_go_with_them() -> None:
    heads = torch.softmax(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 3, -1)
    heads[:, 1] = heads[:, 1].square()
    samples = Samples.of("pv", heads, PerChannel(1))
    choice = sulq_shift(samples, Sulq(3))
    for head in range(3):
        losses = []
        for shift in SHIFTS:
            block = heads[:, head].reshape(1, -1)
            value = Sulq(3).fake_quant(block, Sulq(3).fit_with(block, shift))
            losses.append(float((value - block).double().square().mean()))
        assert float(choice.qparams["shift"][head]) == pytest.approx(SHIFTS[int(np.argmin(losses))])
        assert float(choice.loss[head]) == pytest.approx(min(losses), rel=1e-6)


def test_the_scale_of_log_sqrt2_is_the_best_quantile() -> None:
    attention, _ = synthetic_attention()
    samples = Samples.of("pv", attention)
    choice = mse_percentile(samples, LogSqrt2(4))
    alone = [mse_percentile(samples, LogSqrt2(4), (fraction,)) for fraction in REPQ_FRACTIONS]
    best = min(alone, key=lambda one: float(one.loss))
    assert torch.equal(choice.qparams["scale"], best.qparams["scale"])
    scales = [float(one.qparams["scale"]) for one in alone]
    assert scales == [float(samples.quantile(fraction)) for fraction in REPQ_FRACTIONS]


def test_probabilities_are_searched_by_the_product_with_values() -> None:
    attention = torch.softmax(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2, -1)
    v = torch.randn(2, 3, 8, 4, generator=torch.Generator().manual_seed(1))
    product = Product("pv", attention, v, PerChannel(1), PerChannel(1))
    choice = adalog_base(product.metric("left"), AdaLog(3), torch.ones(3, 1))
    for head in range(3):
        part = attention[:, head : head + 1]
        errors = []
        for base in BASES:
            value = AdaLog(3).fake_quant(part, {"scale": torch.ones(1), "base": torch.tensor([float(base)])})
            errors.append(float(((value - part) @ v[:, head : head + 1]).square().mean()))
        assert float(choice.loss[head]) == pytest.approx(min(errors), rel=1e-4)


def test_scale_and_base_after_gelu_beat_every_base_at_the_first_scale() -> None:
    x = gelu_outputs(1, 3000)
    form, samples = AdaLog(4, shift=GELU_SHIFT), Samples.of("fc2", x)
    first = samples.high + GELU_SHIFT
    choice, again = (adalog_scale_and_base(TensorMetric(samples), samples, form, first=first) for _ in range(2))
    assert float(choice.loss) < float(adalog_base(TensorMetric(samples), form, first).loss)
    assert all(torch.equal(value, again.qparams[name]) for name, value in choice.qparams.items())
    assert float(choice.qparams["base"]) in BASES
    assert float((choice.fake_quant(x, PerTensor()) - x).double().square().mean()) == pytest.approx(float(choice.loss))


class Counting:
    """A metric that counts evaluations."""

    site = "fc2"

    def __init__(self) -> None:
        self.evaluations: list[int] = []

    def losses(self, candidates: Candidates) -> Tensor:
        self.evaluations.append(len(candidates))
        return (candidates.qparams["scale"] - 1).abs()[..., 0].double()


def test_scale_and_base_have_the_published_cost() -> None:
    metric = Counting()
    adalog_scale_and_base(metric, Samples.of("fc2", gelu_outputs(500)), AdaLog(4, shift=GELU_SHIFT))
    assert metric.evaluations == [128] * 7


def test_positive_quantiles_are_order_statistics_of_the_positive_values() -> None:
    samples = Samples.of("fc2", torch.tensor([[-5.0, 3, 1, 2, 4, -1], [-3.0, -2, -1, -4, -5, 0]]), PerChannel(0))
    assert positive_quantile(samples, 0.5).tolist() == [[2], [0]]
    assert positive_quantile(samples, 0.9).tolist() == [[4], [0]]


def test_the_ratio_of_twin_uniform_gelu_codes_is_the_best() -> None:
    x = gelu_outputs(2, 2000) * torch.tensor([[1.0], [4.0]])
    samples = Samples.of("fc2", x, PerChannel(0))
    choice = twin_ratio(TensorMetric(samples), TwinGelu(4), 2)
    for block in range(2):
        errors = [
            (TwinGelu(4).fake_quant(x[block], {"ratio": torch.tensor(float(m))}) - x[block]).square().mean() for m in RATIOS
        ]
        assert float(choice.qparams["ratio"][block]) == RATIOS[int(np.argmin(errors))]


def test_all_candidates_of_a_family_can_be_mixed_with_uniform_codes() -> None:
    attention, _ = synthetic_attention()
    samples = Samples.of("pv", attention)
    losses = {form.name: float(searched(form, samples)[0].loss) for form in (Uniform(4), AdaLog(4), Sulq(4))}
    assert min(losses, key=lambda name: losses[name]) == AdaLog(4).name
