"""Scales of MX and NVFP4: worked examples, exponents at powers of two, torchao's codes."""

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from fxquant.formats import E2M1, E2M3, E3M2, E4M3, E5M2, INT8, FixedGrid, FloatGrid, Mx, Nvfp4
from fxquant.formats.mx import ScaleRule

BLOCK = torch.tensor([[7, -3.1, 0.9, 0.2, 5, -1.2, 2.4, -0.05]])
RULES: tuple[ScaleRule, ...] = ("floor", "ceil", "even", "rceil")
GRIDS = (E5M2, E4M3, E3M2, E2M3, E2M1, INT8)


def scale_of(form: Mx, largest: float) -> float:
    return float(form.fit(torch.tensor([[largest, 0]]))["scale"])


@pytest.mark.parametrize(
    ("rule", "scale", "elements", "values"),
    [
        ("floor", 1, [6, -3, 1, 0, 4, -1, 2, 0], [6, -3, 1, 0, 4, -1, 2, 0]),
        ("rceil", 2, [4, -1.5, 0.5, 0, 2, -0.5, 1, 0], [8, -3, 1, 0, 4, -1, 2, 0]),
    ],
)
def test_the_worked_example_of_a_block(rule: ScaleRule, scale: float, elements: list[float], values: list[float]) -> None:
    form = Mx(E2M1, rule)
    qparams = form.fit(BLOCK)
    assert float(qparams["scale"]) == scale
    assert E2M1.decode(form.quantize(BLOCK, qparams)).tolist() == [elements]
    out = form.fake_quant(BLOCK, qparams)
    assert out.tolist() == [values]
    assert float((out - BLOCK).square().mean()) == pytest.approx(0.2828, abs=5e-5)


@pytest.mark.parametrize(
    ("largest", "scales", "reached"),
    [
        (5, (1, 2, 1, 1), (4, 4, 4, 4)),
        (6.5, (1, 2, 1, 2), (6, 6, 6, 6)),
        (7, (1, 2, 2, 2), (6, 8, 8, 8)),
        (9, (2, 4, 2, 2), (8, 8, 8, 8)),
    ],
)
def test_the_worked_examples_of_the_rules(largest: float, scales: tuple[int, ...], reached: tuple[int, ...]) -> None:
    for rule, scale, value in zip(RULES, scales, reached, strict=True):
        form = Mx(E2M1, rule)
        block = torch.tensor([[float(largest)]])
        assert scale_of(form, largest) == scale
        assert float(form.fake_quant(block, form.fit(block))) == value


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
def test_no_exponent_is_off_by_one_next_to_a_power_of_two(grid: FloatGrid | FixedGrid) -> None:
    top = 2.0 ** (torch.tensor(grid.maximum).log2().floor())
    for exponent in (-100, -3, 0, 7, 90):
        power = torch.tensor(2.0**exponent)
        below, above = (float(torch.nextafter(power, power * end)) for end in (0, 2))
        unit = float(power / top)
        assert [scale_of(Mx(grid, "floor"), x) / unit for x in (below, float(power), above)] == [0.5, 1, 1]
        assert [scale_of(Mx(grid, "ceil"), x) / unit for x in (below, float(power), above)] == [1, 1, 2]
        assert [scale_of(Mx(grid, "even"), x) / unit for x in (below, float(power), above)] == [1, 1, 1]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
def test_rceil_is_the_least_scale_that_clips_nothing(grid: FloatGrid | FixedGrid) -> None:
    for largest in [*torch.logspace(-30, 30, 200).tolist(), grid.maximum, grid.maximum * 1.0001]:
        scale = scale_of(Mx(grid, "rceil"), largest)
        exact = float(torch.tensor(largest))
        assert scale / 2 * grid.maximum < exact <= scale * grid.maximum


def test_scales_stay_in_the_range_of_e8m0() -> None:
    form = Mx(INT8, "ceil")
    assert [scale_of(form, largest) for largest in (0.0, 1e-42, 1.5 * 2.0**-127, 3e38)] == [
        2.0**-127,
        2.0**-127,
        2.0**-126,
        2.0**127,
    ]


def test_every_scale_is_a_value_of_e8m0_and_every_value_a_scale() -> None:
    values = np.arange(255, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)  # 255 is NaN
    scales = Mx(INT8, "ceil").fit(torch.from_numpy(values)[:, None].expand(-1, 32))["scale"].reshape(-1)
    assert scales[0] == values[0] == 2.0**-127
    assert torch.equal(scales, torch.from_numpy(values))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("grid", [E5M2, E4M3], ids=lambda grid: grid.name)
def test_scales_and_codes_are_those_of_torchao(grid: FloatGrid, rule: ScaleRule) -> None:
    config = pytest.importorskip("torchao.prototype.mx_formats.config")
    tensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    x = peers_input()
    dtype = {E5M2: torch.float8_e5m2, E4M3: torch.float8_e4m3fn}[grid]
    scale, data = tensor.to_mx(x, dtype, 32, config.ScaleCalculationMode(rule))
    form = Mx(grid, rule)
    qparams = form.fit(x)
    assert torch.equal(qparams["scale"].log2().view(-1), scale.view(torch.uint8).view(-1).to(torch.float32) - 127)
    assert torch.equal(form.quantize(x, qparams), data.view(torch.uint8).to(torch.int64))


def peers_input() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(256, 32, generator=generator) * torch.logspace(-6, 6, 256)[:, None]


def test_the_worked_example_of_nvfp4() -> None:
    blocks = torch.zeros(2, 16)
    blocks[0, :2] = torch.tensor([1.3, -2.7])
    blocks[1, 3] = 6.5
    form = Nvfp4()
    qparams = form.fit(blocks)
    assert float(qparams["tensor_scale"][0]) == pytest.approx(0.0024181548, rel=1e-7)
    assert float(qparams["scale"][0]) == 192
    assert float(form.step(qparams)[0]) == pytest.approx(0.46428571, rel=1e-7)
    assert form.fake_quant(blocks, qparams)[0, :2].tolist() == pytest.approx([1.392857, -2.785714], rel=1e-6)


def test_nvfp4_takes_a_tensor_scale_from_outside_and_clamps_block_scales() -> None:
    form = Nvfp4()
    blocks = torch.tensor([[1.0], [1e6], [1e-9]])
    qparams = form.fit_with(blocks, torch.tensor(1 / 6))
    assert qparams["scale"].view(-1).tolist() == [1, 448, 2**-9]
