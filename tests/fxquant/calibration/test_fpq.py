"""FPQ: the splits, biases and pre-shifts that the search finds, and what a linear computes with them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import fxquant
from fxquant import CalibrationError
from fxquant.calibration.calibration import Calibration
from fxquant.calibration.searches import llm_fp4
from fxquant.calibration.searches.llm_fp4 import CHANNELS
from fxquant.calibration.site import StaticCoding
from fxquant.formats import LlmFp4
from fxquant.formats.llm_fp4 import split
from fxquant.granularity import PerChannel
from fxquant.planning import ANOTHER_WEIGHT

WIDTH, OUT = 48, 40


def rows(spread: float = 2.0) -> Tensor:
    """Inputs [64, WIDTH] whose channels differ by ``spread`` octaves on either side."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, WIDTH, generator=generator) * torch.logspace(-spread, spread, WIDTH, base=2)


def weight(power: float) -> Tensor:
    """[OUT, WIDTH]: uniform numbers to a power, so that greater powers have longer tails; powers of two for infinity."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.rand(OUT, WIDTH, generator=generator) * 2 - 1
    if power == math.inf:
        return drawn.sign() * torch.exp2(-torch.randint(7, (OUT, WIDTH), generator=generator).to(torch.float32))
    return drawn.sign() * drawn.abs() ** power


def loss(x: Tensor, w: Tensor, coded: Tensor, value: Tensor) -> float:
    return float((coded @ value.T - x @ w.T).square().mean())


@pytest.mark.parametrize(("power", "name"), [(1, "e1m2"), (4, "e2m1"), (math.inf, "e3m0")])
def test_the_split_follows_the_tails_of_the_weight(power: float, name: str) -> None:
    _, found = llm_fp4("site", rows(), weight(power), (4, 8), rounds=1)
    assert isinstance(found.format, LlmFp4)
    assert found.format.grid.name == name
    assert found.qparams["scale"].shape == (OUT, 1)


def test_pre_shifts_are_whole_share_one_bias_and_spare_small_channels() -> None:
    x, w = rows(), weight(2)
    found, of_weight = llm_fp4("site", x, w, (4, 4))
    shift = found.qparams["shift"].view(-1)
    assert isinstance(found.format, LlmFp4)
    assert found.qparams["scale"].unique().numel() == 1
    assert torch.equal(shift, shift.round())
    assert 0 <= float(shift.min()) < float(shift.max()) <= 2**found.format.grid.exponent_bits - 1
    value = of_weight.fake_quant(w, PerChannel(0))
    ours = loss(x, w, found.fake_quant(x, CHANNELS), value)
    one = x.reshape(1, -1)
    for form in (split(3, 0), split(2, 1), split(1, 2)):
        assert ours < loss(x, w, form.fake_quant(one, form.fit(one)).view_as(x), value), "no shifts"


def test_more_rounds_do_not_lose() -> None:
    x, w = rows(), weight(2)
    losses = [float(llm_fp4("site", x, w, (4, 4), rounds=rounds)[0].loss) for rounds in (1, 2, 3)]
    assert losses[1] <= losses[0]
    assert losses[2] <= losses[1]


def test_widths_without_splits_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"site: fpq knows splits of 4, 6 and 8 bits, not of .* \(4, 5\) bits"):
        llm_fp4("site", rows(), weight(1), (4, 5))
    with pytest.raises(CalibrationError, match=r":linear: fpq knows splits"):
        fxquant.calibrate(nn.Linear(WIDTH, OUT), [rows()], scheme="w5a5", method="fpq")


@torch.no_grad()
def test_a_linear_multiplies_the_numbers_that_were_found(tmp_path: Path) -> None:
    model, x = nn.Linear(WIDTH, OUT), rows()
    model.weight.copy_(weight(4))
    fxquant.calibrate(model, [x], scheme="w4a4", method="fpq").save(tmp_path / "file")
    found = Calibration.load(tmp_path / "file")
    site = found.sites[":linear"]
    assert site.codes is not None
    assert site.codes.coding is not None
    assert isinstance(site.static, StaticCoding)
    assert int(site.codes.codes.max()) < 16
    wanted = linear(site.static.coding.fake_quant(x, site.static.qparams), site.codes.value, model.bias)
    options: dict[str, Any] = {"calibration": found, "codegen": "ops"}
    fast = torch.compile(model, backend="fxquant", options=options)
    assert torch.allclose(fast(x), wanted, rtol=1e-5, atol=1e-5)
    (row,) = [row for row in fxquant.report(fast).sites if row.kind == "linear"]
    assert row.scheme == f"w4a4 static {site.static.coding.format.name}"
    assert str(row.reason).endswith(f"weight: {site.codes.coding.format.name}")
    model.weight[0, 0] += 1
    assert [row.reason for row in fxquant.explain(model, x, options=options).sites if row.kind == "linear"] == [ANOTHER_WEIGHT]
