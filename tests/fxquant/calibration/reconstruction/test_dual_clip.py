"""RepQuant's dual clipping: min-max as the limit, two ends, its gradient, and what it learns of a block."""

import math

import pytest
import torch
from torch import Tensor, nn

from fxquant import CalibrationError
from fxquant.calibration.reconstruction.dual_clip import Clipping, DualClip, learn
from fxquant.calibration.reconstruction.early_stop import EarlyStop
from fxquant.calibration.reconstruction.walk import walks
from fxquant.calibration.study import Study
from fxquant.config import override_options
from fxquant.formats import Uniform

WIDTH = 8


def skewed() -> Tensor:
    """Rows [320, 8] with rare peaks on one side."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(320, WIDTH, generator=generator)
    rows[::160] += 12 * torch.rand(2, WIDTH, generator=generator)
    return rows


def test_wide_open_is_min_max_bit_for_bit() -> None:
    rows = skewed()
    form = Uniform(4)
    exact = form.fake_quant(rows.T.contiguous(), form.fit(rows.T.contiguous())).T
    assert torch.equal(DualClip(rows.amin(0), rows.amax(0), 4, opening=1.0).fake_quant(rows), exact)


def test_the_two_ends_are_clipped_apart() -> None:
    clip = DualClip(torch.tensor([-3.0]), torch.tensor([9.0]), 4, opening=1.0)
    with torch.no_grad():
        clip.upper.zero_()  # keeps half
    scale, zero_point = (float(each.detach()) for each in clip.qparams())
    assert scale == pytest.approx(0.5)
    assert zero_point == 6


def test_a_range_without_zero_is_clipped_towards_its_middle() -> None:
    clip = DualClip(torch.tensor([10.0]), torch.tensor([14.0]), 4, opening=0.5)
    ends = clip.fake_quant(torch.tensor([[0.0], [20.0]])).detach()
    assert ends.flatten().tolist() == pytest.approx([11, 13], abs=2 / 15)


def test_a_logit_without_clipped_values_feels_only_the_rounding() -> None:
    clip = DualClip(torch.tensor([-2.0]), torch.tensor([2.0]), 4, opening=0.75)
    x = torch.tensor([[0.5], [-0.7], [0.8]])
    (grad,) = torch.autograd.grad(clip.fake_quant(x).sum(), clip.upper)
    scale, _ = clip.qparams()
    (of_scale,) = torch.autograd.grad(scale.sum(), clip.upper)
    ratio = x / scale.detach()
    residual = float((torch.round(ratio) - ratio).sum())  # rne(v) - v
    assert float(grad) == pytest.approx(residual * float(of_scale), abs=1e-6)
    assert float(grad) != 0


def test_a_range_of_the_wrong_order_is_refused() -> None:
    with pytest.raises(CalibrationError, match="low ≤ high"):
        DualClip(torch.tensor([1.0]), torch.tensor([0.0]), 4)


def learned(how: Clipping, heard: list[tuple[int, int]]) -> tuple[DualClip, EarlyStop]:
    """The clip of a linear's input, learned against what a block of two linears hands on."""
    torch.manual_seed(0)
    net, rows = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, 4)), skewed()
    study = Study(net, override_options(None, scheme="w4a4", calibration=None))
    clip = DualClip(rows.amin(0), rows.amax(0), 4)
    begun = walks(study, rows.split(40), "repquant")
    stop = learn(begun, lambda walk: len(walk.nodes), {"0:linear": clip}, how, 0, lambda *step: heard.append(step))
    return clip, stop


def test_learned_ends_lower_the_error_of_what_the_block_hands_on_and_repeat() -> None:
    heard: list[tuple[int, int]] = []
    how = Clipping(rate=0.05)
    clip, stop = learned(how, heard)
    assert stop.error < 0.8 * stop.measured[0]
    assert heard[0] == (1, how.steps)
    assert heard[-1] == (how.steps, how.steps)
    assert bool(((clip.upper - clip.lower).abs() > 0.1).all())
    assert torch.equal(clip.upper, learned(how, [])[0].upper)


def test_ends_that_cannot_be_learned_stay_where_they_began_and_it_stops_early() -> None:
    heard: list[tuple[int, int]] = []
    clip, stop = learned(Clipping(rate=0.0), heard)
    start = math.log(0.99 / 0.01)
    assert torch.equal(clip.upper, torch.full((WIDTH,), start))
    assert len(stop.measured) == 1 + Clipping().patience
    assert heard[-1] == (200, 200)
