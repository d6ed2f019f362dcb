"""Products of uniform codes: worked examples of the methods, on the reference and on the kernels."""

import pytest
import torch

from fxquant.lowering.pack import pack_linear
from fxquant.reference import linear_dynamic, linear_static, linear_sums, quantize_activation, quantize_static
from fxquant.schemes import Scheme


def test_the_worked_example_of_zero_points() -> None:
    """vit-quantizers section 1: codes of x less 7, and of two rows less 8 and 5, give -85 and 77 by both routes."""
    codes, zero_point = torch.tensor([3, 15, 0, 9]), 7
    rows, zero_points = torch.tensor([[1, 0, 15, 8], [4, 9, 2, 15]]), torch.tensor([8, 5])
    sums = linear_sums(codes, torch.tensor(zero_point), rows - zero_points[:, None])
    assert sums.tolist() == [-85, 77]
    terms = rows @ codes - zero_point * rows.sum(1) - zero_points * codes.sum() + 4 * zero_point * zero_points
    assert torch.equal(sums, terms.to(torch.int32))
    steps, point = torch.ones(1), torch.tensor([zero_point], dtype=torch.int32)
    x = (codes - zero_point).to(torch.float32)
    assert quantize_static(x, steps, point, 4).tolist() == codes.tolist()
    assert linear_static(x, rows - zero_points[:, None], torch.ones(2), None, steps, point, 4).tolist() == [-85, 77]


X, W = torch.tensor([-1, 0.25, 3, 0.5]), torch.tensor([[3, -7, 5, 1]])


def test_the_worked_example_of_a_dynamic_row() -> None:
    """linear-layers section 21.7: Δ = 4 / 255, codes [-128, -48, 127, -32] with zero point -64 (here both 128 more)."""
    codes, scale, zero_point = quantize_activation(X, 8)
    assert (codes.to(torch.int64) - 128).tolist() == [-128, -48, 127, -32]
    assert int(zero_point) - 128 == -64
    assert float(scale) == pytest.approx(4 / 255)
    assert linear_sums(codes, zero_point, W).tolist() == [683]
    assert float(linear_dynamic(X, W, torch.ones(1), None, 8)) == pytest.approx(10.713725, abs=2e-6)


def test_the_kernel_multiplies_the_worked_example() -> None:
    """The largest weight 127 makes the scale of a row 1; the input of that column is zero and has no code of its own."""
    weight, x = torch.cat([W, torch.tensor([[127]])], 1).to(torch.float32), torch.cat([X, torch.zeros(1)])[None]
    y = torch.ops.fxquant.linear_dynamic(x, pack_linear(weight, Scheme(8, 8)), None, 1, 8, 8)
    assert float(y) == pytest.approx(10.713725, abs=2e-6)


@pytest.mark.parametrize("scheme", [Scheme(8, 8), Scheme(8, 7), Scheme(6, 8), Scheme(4, 8)], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_greatest_codes_do_not_saturate_a_product(scheme: Scheme, sign: int) -> None:
    """linear-layers 21.2: (255, 255) · (127, 127) is 64770, and 32767 where a pair is added in 16 bits."""
    weight, x = torch.full((3, 10), float(sign)), torch.ones(2, 10)
    y = torch.ops.fxquant.linear_dynamic(x, pack_linear(weight, scheme), None, 3, scheme.weight_bits, scheme.act_bits)
    torch.testing.assert_close(y, torch.full((2, 3), 10.0 * sign), atol=1e-5, rtol=0)
