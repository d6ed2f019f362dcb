"""FlexQ, FireQ and the search at the linears of a decoder's MLP."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import CalibrationError
from fxquant.calibration.calibration import Calibration
from fxquant.calibration.migration import fireq
from fxquant.calibration.migration.balance import Balancing
from fxquant.calibration.observers import BalancedGram
from fxquant.calibration.qparams import StaticQParams
from fxquant.calibration.recipes.llm import fp8_scaled
from fxquant.calibration.seen import Seen, see
from fxquant.reference import dequantize_weight, fake_quant_per_token

WIDTH, INNER = 64, 128


class Mlp(nn.Module):
    """SwiGLU behind a norm, added to its input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.RMSNorm(WIDTH)
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(INNER, WIDTH, bias=False)
        nn.init.uniform_(self.norm.weight, 0.2, 3)
        self.gate_proj.weight.data[:5] *= 8  # heavy tails before down_proj

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down_proj(nn.functional.silu(self.gate_proj(y)) * self.up_proj(y))  # type: ignore[no-any-return]


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(WIDTH, generator=generator) * torch.linspace(0, 4, WIDTH)
    return [torch.randn(8, 40, WIDTH, generator=generator) + mean for _ in range(7)]


def compiled(model: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="fxquant", options={"codegen": "ops", **options})


@torch.no_grad()
def error(model: nn.Module, x: Tensor, **options: Any) -> float:
    wanted = model(x) - x
    return float((compiled(model, **options)(x) - x - wanted).square().sum() / wanted.square().sum())


def schemes(model: nn.Module, x: Tensor, calibration: Calibration) -> dict[str, str | None]:
    report = fxquant.explain(model, x, options={"calibration": calibration})
    return {row.name: row.scheme for row in report.sites if row.kind == "linear"}


def test_flexq_gives_eight_bits_to_the_input_that_loses_most() -> None:
    model, (*seen, unseen) = Mlp(), batches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxquant.calibration.recipes.llm.PROMOTED_SHARE", 0.4)
        found = fxquant.calibrate(model, seen, scheme="w6a6", method="flexq")
    expected = {"gate_proj:linear": "w6a6", "up_proj:linear": "w6a6", "down_proj:linear": "w6a8"}
    assert {name: site.scheme for name, site in found.sites.items()} == expected
    assert schemes(model, unseen, found) == expected
    assert error(model, unseen, calibration=found) < error(model, unseen, scheme="w6a6")


def test_flexq_promotes_nothing_beyond_its_share_and_refuses_other_schemes() -> None:
    model, seen = Mlp(), batches()
    found = fxquant.calibrate(model, seen, scheme="w6a6", method="flexq")  # every class has a third of the multiplications
    assert {site.scheme for site in found.sites.values()} == {"w6a6"}
    with pytest.raises(CalibrationError, match="flexq codes linears of the scheme w6a6, not of w8a8"):
        fxquant.calibrate(model, seen, scheme="w8a8", method="flexq")


def test_fireq_has_fp8_scales_and_even_columns() -> None:
    model, (*seen, unseen) = Mlp(), batches()
    found = fxquant.calibrate(model, seen, scheme="w4a8-g32", method="fireq")
    site, weight = found.sites["down_proj:linear"], model.down_proj.weight.detach()
    assert site.codes is not None
    assert site.migration is not None
    assert site.migration.factor is not None
    scaled = weight * site.migration.factor
    torch.testing.assert_close(scaled.abs().mean(0), weight.abs().mean().expand(INNER))
    power = fireq.tensor_scale(scaled, 32)
    assert torch.equal(fireq.fp8_scale(site.codes.scale * power), site.codes.scale * power)
    assert float((site.codes.value - scaled).abs().max()) < float(site.codes.scale.max())
    assert schemes(model, unseen, found)["down_proj:linear"] == "w4a8-g32"
    assert error(model, unseen, calibration=found) < 0.05
    with pytest.raises(CalibrationError, match="fireq codes linears of w4a8"):
        fxquant.calibrate(model, seen, scheme="w8a8", method="fireq")


@pytest.mark.parametrize("scheme", ["w6a6", "w8a8"])
def test_the_search_beats_min_max_and_smoothquant(scheme: str) -> None:
    model, (*seen, unseen) = Mlp(), batches()
    found = fxquant.calibrate(model, seen, scheme=scheme, method="search")
    moved = found.sites["up_proj:linear"].migration
    assert moved is not None
    assert moved.shift is not None, "the mean of its input is far from zero"
    ours = error(model, unseen, calibration=found)
    for method in ("minmax", "smoothquant"):
        assert ours < error(model, unseen, calibration=fxquant.calibrate(model, seen, scheme=scheme, method=method))


def test_channels_of_unlike_ranges_that_are_always_filled_are_static() -> None:
    torch.manual_seed(0)
    model, scale = nn.Linear(WIDTH, 32), torch.logspace(-1, 1, WIDTH)
    x = (torch.rand(2000, WIDTH) - 0.3) * scale
    model.weight.data /= scale
    found = fxquant.calibrate(model, [x], scheme="w8a8", method="search")
    site = found.sites[":linear"]
    assert isinstance(site.static, StaticQParams)
    assert site.migration is not None
    assert site.migration.shift is not None
    assert schemes(model, x, found)[":linear"] == "w8a8 static"
    with torch.no_grad():
        assert float((compiled(model, calibration=found)(x) - model(x)).square().sum() / model(x).square().sum()) < 1e-3


def test_a_search_that_prefers_static_takes_it_where_it_is_as_good_as_no_search() -> None:
    model, (*seen, unseen) = Mlp(), batches()
    by_accuracy, by_speed = (
        fxquant.calibrate(model, seen, scheme="w8a8", method=name).sites for name in ("search", "search-static")
    )
    static = {name: site.static is not None for name, site in by_speed.items()}
    assert static == {"gate_proj:linear": True, "up_proj:linear": True, "down_proj:linear": False}
    assert by_accuracy["gate_proj:linear"].static is None
    found = fxquant.calibrate(model, seen, scheme="w8a8", method="search-static")
    assert schemes(model, unseen, found)["up_proj:linear"] == "w8a8 static"
    assert error(model, unseen, calibration=found) < error(model, unseen, scheme="w8a8")


def test_a_site_that_static_codes_would_harm_stays_dynamic_and_says_so() -> None:
    model, seen = Mlp(), batches()
    seen[0][0, 0] = 0
    seen[0][0, 0, 3] = 40  # one token like the first one of a language model
    model.norm.weight.data[3] = 100
    found = fxquant.calibrate(model, seen, scheme="w8a8", method="search").sites["down_proj:linear"]
    assert found.static is None
    assert found.note is not None
    assert "0.5 dB" in found.note
    assert found.migration is not None


def test_balance_lowers_the_noise_that_it_predicts_and_the_error_that_there_is() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 48, generator=generator) * torch.logspace(-1, 1, 48) + torch.linspace(-9, 9, 48)
    weight = torch.randn(32, 48, generator=generator)
    seen = BalancedGram("site")
    seen.observe(rows)
    linear = Balancing(weight, seen, rows, 8, 6)
    found = linear.dynamic()
    assert found.noise < linear.plain_noise() / 2
    wanted = rows @ weight.T
    plain = (fake_quant_per_token(rows, 6) @ weight.T - wanted).square().sum()
    coded = fake_quant_per_token((rows - found.shift) / found.factor, 6) * found.factor + found.shift
    assert float((coded @ weight.T - wanted).square().sum()) < float(plain) / 2
    static = linear.static()
    codes = torch.round((rows - static.shift) / static.factor)
    assert int(codes.abs().max()) <= 31, "no value of the data is clipped"


def test_a_long_row_counts_as_a_usual_one() -> None:
    rows = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    rows[0] *= 1000
    rows[1] /= 1000
    seen = BalancedGram("site")
    seen.observe(rows)
    square = rows.square().mean(1)
    counts = 1 / square.clamp_min(float(square.median()))
    torch.testing.assert_close(seen.counts(rows), counts)
    torch.testing.assert_close(seen.gram, ((rows * counts[:, None]).T @ rows / counts.sum()).double(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen.mean, counts @ rows / counts.sum(), atol=1e-5, rtol=1e-4)
    parts = BalancedGram("site")
    for part in rows.split(32):
        parts.observe(part)
    assert parts.rows == seen.rows
    restored = BalancedGram("site")
    restored.restore(parts.state())
    assert torch.equal(restored.gram, parts.gram)


def test_statistics_of_a_shifted_input_are_those_of_the_difference() -> None:
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 3
    shift = torch.linspace(-2, 5, 6)
    moved, wanted = see(rows).shifted(shift), see(rows - shift)
    torch.testing.assert_close(moved.need("hessian", "test"), wanted.need("hessian", "test"), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moved.need("mean", "test"), wanted.need("mean", "test"), atol=1e-6, rtol=1e-6)
    assert moved.rows is None
    with pytest.raises(CalibrationError, match="needs the statistic 'rows'"):
        Seen(3).shifted(shift)


def test_the_worked_example_of_fireqs_group_by_the_recipe() -> None:
    weight = torch.tensor([[0.003, -0.0021, 0.0010, -0.0004]])
    codes, scale = fp8_scaled(weight, 4, 4, Seen(1))
    assert float(scale) * 8 == float(fireq.fp8_scale(scale * 8)), "the slack rule picks T = 8"
    value = dequantize_weight(codes, scale, 4)
    assert float((value - weight).norm() / weight.norm()) == pytest.approx(0.0489, abs=5e-4)
