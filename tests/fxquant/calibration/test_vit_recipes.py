"""Published quantizers of vision transformers as methods of ``fxquant.calibrate``."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, gelu, scaled_dot_product_attention

import fxquant
from fxquant.calibration.calibration import Calibration
from fxquant.calibration.channel_coding import ChannelCoding
from fxquant.calibration.qparams import StaticQParams
from fxquant.calibration.recipes.norm_inputs import percentile_channels, power_of_two_factors
from fxquant.calibration.recipes.vit import VIT_RECIPES
from fxquant.calibration.rounding import percentile
from fxquant.calibration.site import StaticCoding
from fxquant.errors import CalibrationError

METHODS = [recipe.name for recipe in VIT_RECIPES]
WIDTH, HEADS, TOKENS = 32, 2, 24


class Block(nn.Module):
    """Pre-norm, with channels of very different range behind its norms, as trained vision transformers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        with torch.no_grad():
            for norm in (self.norm1, self.norm2):
                norm.weight.mul_(torch.logspace(-1, 1, WIDTH)).div_(2)
                norm.bias.add_(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        x = x + self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y: Tensor = x + self.fc2(gelu(self.fc1(self.norm2(x))))
        return y


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()).eval()


def batches(count: int = 2) -> list[Tensor]:
    return [torch.randn(4, TOKENS, WIDTH, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def compiled(net: nn.Module, calibration: Calibration, scheme: str) -> Any:
    options: Any = {"scheme": scheme, "calibration": calibration, "codegen": "ops"}
    return torch.compile(net, backend="fxquant", options=options)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_codes_every_linear_and_attention_in_its_own_way(method: str) -> None:
    net, data = model(), batches()
    plain = fxquant.calibrate(net, data, scheme="w8a8", method="minmax")
    known = fxquant.calibrate(net, data, scheme="w8a8", method=method)
    assert known.sites.keys() == plain.sites.keys()
    assert all(known.sites[name].static is not None for name in known.sites)
    assert all(known.sites[name].digest != plain.sites[name].digest for name in known.sites)
    assert [*known.attention] == ["0", "1"]
    assert not plain.attention
    x = batches(3)[-1]
    with torch.no_grad():
        call = compiled(net, known, "w8a8")
        got, wanted = call(x), net(x)
    assert float(cosine_similarity(got.flatten(), wanted.flatten(), 0)) > 0.99
    schemes = [site.scheme for site in fxquant.report(call).sites if site.kind.startswith("attention")]
    assert len(schemes) == 4
    assert all(schemes)


def test_channels_of_a_norm_as_one_tensor_give_the_codes_of_the_channels() -> None:
    """vit-quantizers 5.6."""
    x = torch.tensor([[1.2, -0.8, 0.5], [0.5, 0.2, -2.1], [-1.2, -0.05, 2.3], [0.3, -0.55, 1.3]])
    coding = ChannelCoding(torch.tensor([0.17, 0.07, 0.31]), torch.tensor([7.0, 12.0, 7.0]))
    static, shift = coding.as_one(4)
    assert static.zero_point == 9
    assert abs(static.scale - 0.1833333) < 1e-6
    torch.testing.assert_close(static.factor, torch.tensor([0.927273, 0.381818, 1.690909]), atol=1e-6, rtol=0)
    codes = (torch.round((x - shift) / static.steps) + static.zero_point).clamp(0, 15)
    wanted = [[14, 1, 9], [10, 15, 0], [0, 11, 14], [9, 4, 11]]
    assert codes.tolist() == wanted
    other, other_shift = coding.as_one(4, torch.median)
    assert other.zero_point == 7
    moved = (torch.round((x - other_shift) / other.steps) + other.zero_point).clamp(0, 15)
    torch.testing.assert_close((moved - 7) * other.steps + other_shift, (codes - 9) * static.steps + shift)


def test_a_shift_of_the_input_is_the_same_function() -> None:
    """repq at 8 bits: against a calibration per channel without rounding of weights the output only has rounding noise."""
    norm = nn.LayerNorm(WIDTH)
    net = nn.Sequential(norm, nn.Linear(WIDTH, 48)).eval()
    with torch.no_grad():
        norm.bias.add_(5 * torch.randn(WIDTH))
    x = torch.randn(300, WIDTH)
    known = fxquant.calibrate(net, [x], scheme="w8a8", method="repq")
    site = known.sites["1:linear"]
    assert site.migration is not None
    assert site.migration.shift is not None
    assert float(site.migration.shift.abs().amax()) > 1
    with torch.no_grad():
        got, wanted = compiled(net, known, "w8a8")(x), net(x)
    assert float((got - wanted).square().mean() / wanted.square().mean()) < 2e-4


@pytest.mark.parametrize(("method", "kind"), [("ptq4vit", "TwinGelu"), ("adalog", "AdaLog")])
def test_the_input_after_gelu_has_the_format_of_the_method(method: str, kind: str) -> None:
    known = fxquant.calibrate(model(), batches(), scheme="w4a4", method=method)
    static = known.sites["0.fc2:linear"].static
    assert isinstance(static, StaticCoding)
    assert type(static.coding.format).__name__ == kind
    assert isinstance(known.sites["0.fc1:linear"].static, StaticQParams)


def test_power_of_two_factors_are_powers_of_two_and_no_worse_than_one_scale() -> None:
    rows = torch.randn(500, 16) * torch.logspace(-1.5, 0, 16)
    static = power_of_two_factors(rows, 4)
    assert set(static.factor.tolist()) == {1.0, 2.0, 4.0, 8.0}

    def error(factor: Tensor, scale: float) -> float:
        step = factor * scale
        codes = (torch.round(rows / step) + static.zero_point).clamp(0, 15)
        return float((rows - (codes - static.zero_point) * step).square().sum())

    assert error(static.factor, static.scale) < error(torch.ones(16), 8 * static.scale)


def test_percentiles_of_channels_leave_outliers_out() -> None:
    rows = torch.randn(2000, 4)
    rows[0, 2] = 10.0
    scale = percentile_channels(rows, 4, (0.999, 1.0)).scale
    assert float(scale[2]) < 2 * float(scale[1])


def test_percentiles_of_weights_take_the_one_of_least_error() -> None:
    weight = torch.randn(3, 1000)
    weight[1, 5] = 30.0
    codes, scale = percentile.round_weight(weight, 4, fractions=(0.99, 1.0))
    assert float(scale[1]) < 1.0
    assert int(codes.abs().amax()) == 7
    with pytest.raises(CalibrationError, match="group of 128"):
        percentile.round_weight(weight, 4, 128)


def test_other_methods_code_attention_where_the_option_asks_for_it() -> None:
    net, data = model(), batches()
    options = {"attention": "calibrated"}
    known = fxquant.calibrate(net, data, scheme="w8a8", method="minmax", options=options)
    assert [*known.attention] == ["0", "1"]
    with pytest.raises(CalibrationError, match="'gptq' has no codings of attention"):
        fxquant.calibrate(net, data, scheme="w8a8", method="gptq", options=options)
    off = fxquant.calibrate(net, data, scheme="w8a8", method="repq", options={"attention": "off"})
    assert not off.attention
    with torch.no_grad():
        asked: Any = {"attention": "calibrated", "codegen": "ops"}
        call: Any = torch.compile(net, backend="fxquant", options=asked)
        call(data[0])
    said = [str(site.reason) for site in fxquant.report(call).sites if site.kind == "attention.qk"]
    assert all("no calibration has codings of it" in sentence for sentence in said)


def test_attention_is_sampled_on_after_a_stop(tmp_path: Path) -> None:
    net, data = model(), batches(4)
    whole = fxquant.calibrate(net, data, scheme="w4a4", method="repq")

    def interrupted() -> Any:
        yield from data[:2]
        raise KeyboardInterrupt

    kept = tmp_path / "kept.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fxquant.calibrate(net, interrupted(), scheme="w4a4", method="repq", checkpoint=kept)
    assert kept.exists()
    assert fxquant.calibrate(net, data, scheme="w4a4", method="repq", checkpoint=kept) == whole
