"""nearest, mse, hessian_weighted and awq's clip search: reference codes, noise of a Gaussian, each best in its own metric."""

import pytest
import torch
from torch import Tensor

from fxquant.calibration.rounding import awq, flexq, hessian_weighted, mse, nearest
from fxquant.calibration.rounding.grid import output_sqnr, row_errors
from fxquant.calibration.seen import Seen, see
from fxquant.errors import CalibrationError
from fxquant.reference import dequantize_weight, linear_dynamic, linear_groups, quantize_weight, quantize_weight_groups

GAUSSIAN_SQNR = {2: 2.3, 3: 11.2, 4: 18.6, 5: 25.2, 6: 31.5, 8: 43.7}  # dB, symmetric, groups of 128


def weights(n: int = 8, k: int = 96, seed: int = 0) -> Tensor:
    """Weights [N, K] with heavy tails, so that clipping pays."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator) * (1 + torch.randn(n, k, generator=generator).abs() ** 3)


def inputs(k: int = 96) -> Tensor:
    """Rows [200, K]: channels of unlike size, correlated."""
    generator = torch.Generator().manual_seed(7)
    mixing = torch.eye(k) + torch.randn(k, k, generator=generator) / k**0.5
    drawn: Tensor = torch.randn(200, k, generator=generator) @ mixing * torch.logspace(-1, 1, k)
    return drawn


@pytest.mark.parametrize("bits", range(2, 9))
def test_nearest_codes_are_those_of_the_reference(bits: int) -> None:
    for group in (16, 40):
        codes, scale = nearest.round_weight(weights(), bits, group)
        expected = quantize_weight_groups(weights(), bits, group)
        assert torch.equal(codes, expected[0])
        assert torch.equal(scale, expected[1])
    codes, scale = nearest.round_weight(weights(), bits)
    expected = quantize_weight(weights(), bits)
    assert torch.equal(codes, expected[0])
    assert torch.equal(scale, expected[1])


@pytest.mark.parametrize(("bits", "expected"), GAUSSIAN_SQNR.items())
def test_the_noise_of_nearest_codes_of_a_gaussian(bits: int, expected: float) -> None:
    weight = torch.randn(128, 1024, generator=torch.Generator().manual_seed(0))
    rounded = dequantize_weight(*nearest.round_weight(weight, bits, 128), 128)
    sqnr = 10 * torch.log10(weight.square().sum() / (weight - rounded).square().sum())
    assert float(sqnr) == pytest.approx(expected, abs=0.3)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [0, 32, 40])
def test_every_search_is_at_least_as_good_as_nearest_in_its_own_metric(bits: int, group: int) -> None:
    weight, seen = weights(), see(inputs())
    hessian = seen.need("hessian", "test")
    diagonal = torch.diag(hessian.diagonal())
    plain = dequantize_weight(*nearest.round_weight(weight, bits, group), group)
    by_mse = dequantize_weight(*mse.round_weight(weight, bits, group), group)
    assert ((weight - by_mse).square().sum(1) <= (weight - plain).square().sum(1) * (1 + 1e-6)).all()
    weighted = dequantize_weight(*hessian_weighted.round_weight(weight, bits, group, seen), group)
    assert (row_errors(weight, weighted, diagonal) <= row_errors(weight, plain, diagonal) * (1 + 1e-5)).all()
    clipped = dequantize_weight(*awq.round_weight(weight, bits, group, seen), group)
    blocks = block_diagonal(hessian, group)
    assert (row_errors(weight, clipped, blocks) <= row_errors(weight, plain, blocks) * (1 + 1e-5)).all()


def block_diagonal(hessian: Tensor, group: int) -> Tensor:
    """The parts of H within one group."""
    index = torch.arange(len(hessian)) // (group or len(hessian))
    return torch.where(index[:, None] == index, hessian, 0.0)


def test_clipping_pays_at_few_bits() -> None:
    weight, seen = weights(), see(inputs())
    hessian = seen.need("hessian", "test")
    plain = output_sqnr(weight, dequantize_weight(*nearest.round_weight(weight, 3, 0), 0), hessian)
    assert output_sqnr(weight, dequantize_weight(*awq.round_weight(weight, 3, 0, seen), 0), hessian) > plain + 1
    assert output_sqnr(weight, dequantize_weight(*hessian_weighted.round_weight(weight, 3, 0, seen), 0), hessian) > plain + 1


def test_mean_squares_stand_in_for_the_hessians_diagonal() -> None:
    seen = see(inputs())
    without = Seen(seen.tokens, mean_square=seen.mean_square)
    for ours, theirs in zip(
        hessian_weighted.round_weight(weights(), 4, 32, seen),
        hessian_weighted.round_weight(weights(), 4, 32, without),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_the_error_of_rows_is_that_of_outputs() -> None:
    weight, rows = weights(), inputs()
    rounded = dequantize_weight(*nearest.round_weight(weight, 4), 0)
    outputs = ((weight - rounded).to(torch.float64) @ rows.to(torch.float64).T).square().mean(1)
    torch.testing.assert_close(row_errors(weight, rounded, see(rows).need("hessian", "test")), outputs, rtol=1e-9, atol=0)


def test_the_integer_linear_runs_the_codes_of_any_scale() -> None:
    weight, x = weights(), inputs()
    for group in (0, 32):
        codes, scale = mse.round_weight(weight, 4, group)
        y = linear_groups(x, codes, scale, None, group) if group else linear_dynamic(x, codes, scale, None, 8)
        exact = x @ dequantize_weight(codes, scale, group).T
        assert float((y - exact).square().mean() / exact.square().mean()) < 1e-3


def test_zero_rows_and_columns_are_rounded_to_zero() -> None:
    weight = weights()
    weight[2], weight[:, 5] = 0, 0
    for codes, scale in (mse.round_weight(weight, 4, 32), awq.round_weight(weight, 4, 32, see(inputs()))):
        assert (codes[2] == 0).all()
        assert (codes[:, 5] == 0).all()
        assert torch.isfinite(scale).all()
        assert (scale > 0).all()


@pytest.mark.parametrize(("bits", "group", "words"), [(1, 0, "2 to 8 bits"), (9, 0, "2 to 8 bits"), (4, -1, "group")])
def test_codes_that_no_kernel_has_are_refused(bits: int, group: int, words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        nearest.round_weight(weights(), bits, group)


def test_a_weight_that_is_not_finite_is_refused() -> None:
    weight = weights()
    weight[0, 0] = float("inf")
    with pytest.raises(CalibrationError, match="finite weights"):
        mse.round_weight(weight, 4)


def test_the_worked_example_of_flexqs_planes() -> None:
    x, w = torch.tensor([5, -3, 31, -32]), torch.tensor([-7, 2, -32, 1])
    planes = flexq.bit_planes(x, 6), flexq.bit_planes(w, 6)
    weights_of_bits = 2 ** torch.arange(4)
    assert (planes[0] * weights_of_bits).sum(1).tolist() == [7, 4, 7, 6, 6, 10]
    assert (planes[1] * weights_of_bits).sum(1).tolist() == [9, 2, 0, 1, 1, 5]
    assert (planes[0][:, None] & planes[1]).sum(-1).tolist() == [
        [1, 1, 0, 1, 1, 2],
        [0, 0, 0, 0, 0, 1],
        [1, 1, 0, 1, 1, 2],
        [0, 1, 0, 0, 0, 1],
        [0, 1, 0, 0, 0, 1],
        [1, 1, 0, 0, 0, 0],
    ]
    assert int(flexq.plane_product(*planes)) == -1065 == int((x * w).sum())


def test_planes_of_unlike_widths_multiply_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randint(-128, 128, (500,), generator=generator), torch.randint(-32, 32, (500,), generator=generator)
    assert int(flexq.plane_product(flexq.bit_planes(x, 8), flexq.bit_planes(w, 6))) == int((x * w).sum())


def test_flexq_gives_eight_bits_to_what_loses_most() -> None:
    loss, cost = {"qkv": 0.01, "down": 0.4, "up": 0.02, "dead": 0.0}, {"qkv": 3.0, "down": 1.0, "up": 1.0, "dead": 0.0}
    assert flexq.promote(loss, cost, 1.0) == {"qkv": 6, "down": 8, "up": 6, "dead": 6}
    assert flexq.promote(loss, cost, 2.5) == {"qkv": 6, "down": 8, "up": 8, "dead": 6}
    assert flexq.promote(loss, cost, 9.0) == {"qkv": 8, "down": 8, "up": 8, "dead": 6}


def test_flexq_is_nearest_with_six_bits_and_groups_of_128() -> None:
    weight = weights(4, 256)
    assert torch.equal(flexq.round_weight(weight)[0], nearest.round_weight(weight, 6, 128)[0])
