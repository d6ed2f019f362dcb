"""RepQ-ViT's worked example: 4 bits, scales and zero points of three channels become one (vit-quantizers 5.6)."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fxquant.passes.reparam import one_scale
from fxquant.passes.reparam.legality import WHOLE
from fxquant.testing.graphs import Captured, capture_call

GAMMA, BETA = torch.tensor([1.0, 0.5, 2.0]), torch.tensor([0.1, -0.2, 0.3])
WEIGHT, BIAS = torch.tensor([[0.2, -0.4, 0.1], [0.5, 0.3, -0.6]]), torch.tensor([0.05, -0.1])
ROWS = torch.tensor([[1.1, -1.2, 0.1], [0.4, 0.8, -1.2], [-1.3, 0.3, 1.0], [0.2, -0.7, 0.5]])
OUTPUTS = torch.tensor([[0.658, -0.108], [-0.149, 1.52], [0.057, -2.018], [0.466, -0.842]])
GIVEN = {
    "scale": torch.tensor([0.17, 0.07, 0.31]),
    "zero_point": torch.tensor([7.0, 12.0, 7.0]),
    "tensor_scale": torch.tensor([0.55 / 3]),
    "tensor_zero_point": torch.tensor([9.0]),
}


def captured() -> Captured:
    norm, layer = nn.LayerNorm(3), nn.Linear(3, 2)
    norm.weight, norm.bias, layer.weight, layer.bias = map(nn.Parameter, (GAMMA, BETA, WEIGHT, BIAS))
    return capture_call(nn.Sequential(norm, layer), torch.linspace(-2, 3, 30).reshape(2, 5, 3).sin())


def codes_of(normal: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return (torch.round(normal / scale) + zero_point).clamp(0, 15)


def close(found: Tensor, wanted: object, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, torch.as_tensor(wanted), rtol=0, atol=tolerance)


def test_one_scale_gives_the_very_same_codes() -> None:
    made = captured()
    assert made.change({"one_scale": {"1:linear": GIVEN}}) == {"one_scale": [None]}
    layer, normed = made.node("linear"), made.node("layer_norm")
    gamma, beta, weight, bias = (made.value(node) for node in (*normed.args[2:4], *layer.args[1:3]))
    assert made.error() < 2e-5
    close(gamma, [1.078431, 1.309524, 1.182796])
    close(beta, [-0.258824, 0.026190, -0.189247])
    close(weight, [[0.185455, -0.152727, 0.169091], [0.463636, 0.114545, -1.014545]])
    close(bias, [0.264, -0.365])
    old = codes_of(ROWS * GAMMA + BETA, GIVEN["scale"], GIVEN["zero_point"])
    new = codes_of(ROWS * gamma + beta, GIVEN["tensor_scale"], GIVEN["tensor_zero_point"])
    assert old.tolist() == new.tolist() == [[14, 1, 9], [10, 15, 0], [0, 11, 14], [9, 4, 11]]
    close(linear((new - 9) * GIVEN["tensor_scale"], weight, bias), OUTPUTS)


def test_a_zero_point_that_is_not_whole_changes_the_codes_and_is_refused() -> None:
    """The mean of the zero points, 26 / 3, that the reference code of RepQ-ViT does not round."""
    wrong = {**GIVEN, "tensor_zero_point": torch.tensor([26 / 3])}
    moved = one_scale.rewrite(GAMMA, BETA, WEIGHT, BIAS, **wrong)
    codes = codes_of(ROWS * moved["gamma"] + moved["beta"], wrong["tensor_scale"], wrong["tensor_zero_point"])
    close(codes, [[13.667, 0.667, 8.667], [9.667, 14.667, 0.667], [0, 11.667, 14.667], [8.667, 3.667, 11.667]], 1e-3)
    outputs = linear((codes - 26 / 3) * wrong["tensor_scale"], moved["weight"], moved["bias"])
    assert float((outputs - OUTPUTS).abs().max()) == pytest.approx(0.159, abs=5e-4)
    assert captured().change({"one_scale": {"1:linear": wrong}}) == {"one_scale": [WHOLE]}
