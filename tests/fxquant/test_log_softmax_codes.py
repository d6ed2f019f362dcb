"""Codes straight from logits, and exact shift products: worked examples, and against the formats on probabilities."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.errors import FormatError
from fxquant.formats import AdaLog, Log2, LogSqrt2, SoftmaxBinary, ZeroPolicy
from fxquant.formats.log_codes import LogFormat
from fxquant.reference.log_softmax_codes import (
    adalog_matmul,
    binary_codes_from_logits,
    codes_from_logits,
    log2_matmul,
    log2_product,
    log_sqrt2_matmul,
    log_sqrt2_product,
)

ONE = torch.ones(1, 1)
A = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.02, 0.02]])
V = torch.tensor([[12], [-7], [100], [-33], [5], [64]])
FAMILIES = [(Log2(4), 1.0), (LogSqrt2(4), 2.0), (AdaLog(4), 37 / 20), (AdaLog(3, "reserve_top"), 37 / 42)]


def qparams(form: LogFormat, k: float) -> dict[str, Tensor]:
    """Scale 1, and the base of AdaLog for the factor k."""
    return {"scale": ONE, "base": round(37 / k) * ONE} if isinstance(form, AdaLog) else {"scale": ONE}


def lse_of(logits: Tensor) -> Tensor:
    return torch.logsumexp(logits, -1, keepdim=True)


def test_the_worked_example_of_codes() -> None:
    logits = torch.tensor([[4.0, 1.0, 0.0, -2.0]])
    assert codes_from_logits(logits, lse_of(logits), 1, 15).tolist() == [[0, 4, 6, 9]]
    assert codes_from_logits(logits, lse_of(logits), 2, 31).tolist() == [[0, 9, 12, 18]]
    assert codes_from_logits(logits, lse_of(logits), 2, 15).tolist() == [[0, 9, 12, 15]]


@pytest.mark.parametrize(("form", "k"), FAMILIES, ids=["log2", "log-sqrt2", "adalog-4", "adalog-3"])
def test_codes_are_those_of_the_probabilities_away_from_thresholds(form: LogFormat, k: float) -> None:
    logits = 2 * torch.randn(500, 197, dtype=torch.float32)
    top = form.code_count - 1
    codes = codes_from_logits(logits, lse_of(logits), k, top)
    exact = -k * torch.log_softmax(logits.to(torch.float64), -1) / math.log(2)
    is_clear = (exact - torch.floor(exact) - 0.5).abs() > 2e-5
    assert torch.equal(codes[is_clear], form.quantize(torch.softmax(logits, -1), qparams(form, k))[is_clear])
    assert is_clear.double().mean() > 0.999


def test_a_scale_of_the_probabilities_is_a_term_of_lse() -> None:
    logits = torch.randn(64, 50)
    delta = torch.softmax(logits, -1).amax()
    codes = codes_from_logits(logits, lse_of(logits) + delta.log(), 2, 16)
    wanted = LogSqrt2(4).quantize(torch.softmax(logits, -1), {"scale": delta.reshape(1, 1)})
    assert (codes != wanted).double().mean() < 1e-3
    assert int((codes - wanted).abs().max()) <= 1


def test_masked_logits_and_masked_rows_have_the_last_code() -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0], [-math.inf] * 3])
    assert codes_from_logits(logits, lse_of(logits), 1, 16).tolist() == [[1, 16, 1], [16, 16, 16]]
    assert binary_codes_from_logits(logits).tolist() == [[1, 0, 1], [0, 0, 0]]


def test_binary_codes_need_no_exp() -> None:
    logits = 2 * torch.randn(300, 64)
    form, rows = SoftmaxBinary(), torch.softmax(logits, -1)
    is_clear = (logits - logits.amax(-1, keepdim=True) + math.log(4)).abs() > 1e-5
    assert torch.equal(binary_codes_from_logits(logits)[is_clear], form.quantize(rows, form.fit(rows))[is_clear])


def test_the_worked_example_of_log2_products() -> None:
    codes = Log2(4).quantize(A, {"scale": ONE})
    assert codes.tolist() == [[1, 2, 3, 4, 6, 6]]
    total = log2_matmul(codes, V, 8)
    assert total.tolist() == [[4036]]
    assert log2_product(total, 8, 1.0).tolist() == [[15.765625]]


def test_the_worked_example_of_log_sqrt2_products() -> None:
    codes = LogSqrt2(4).quantize(A, {"scale": ONE})
    assert codes.tolist() == [[2, 3, 7, 8, 11, 11]]
    even, odd = log_sqrt2_matmul(codes, V, 8)
    assert (even.tolist(), odd.tolist()) == ([[1008]], [[1428]])
    assert float(log_sqrt2_product(even, odd, 8, 1.0)) == pytest.approx(11.82616002761242, rel=1e-15)


def test_a_worked_example_of_adalog_products() -> None:
    """Base 20, F = 30: codes 2, 3, 6, 8, 10, 10; Σ v m << (5 - shift) = 12·28·16 - 7·19·16 + 100·25·4 - 33·24·2 + 69·23."""
    form = AdaLog(4)
    codes = form.quantize(A, {"scale": ONE, "base": 20 * ONE})
    assert codes.tolist() == [[2, 3, 6, 8, 10, 10]]
    shifts, mantissas = form.shifts_and_mantissas(torch.arange(11), torch.tensor(20.0))
    total = adalog_matmul(codes, V, shifts, mantissas)
    assert total.tolist() == [[12 * 28 * 16 - 7 * 19 * 16 + 100 * 25 * 4 - 33 * 24 * 2 + 69 * 23]]
    assert float(log2_product(total, 5, 1 / 30)) == pytest.approx(
        float(form.fake_quant(A, {"scale": ONE, "base": 20 * ONE}) @ V.float())
    )


@settings(max_examples=40, deadline=None)
@given(numbers=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40), seed=st.integers(0, 1000))
@pytest.mark.parametrize("zero", ["ref_extra", "reserve_top", "saturate"])
def test_products_are_those_of_the_values(zero: ZeroPolicy, numbers: list[float], seed: int) -> None:
    row = torch.tensor([numbers])
    values = torch.randint(-127, 128, (len(numbers), 3), generator=torch.Generator().manual_seed(seed))
    for family, k in ((Log2, 1.0), (LogSqrt2, 2.0), (AdaLog, 37 / 20)):
        form: LogFormat = family(4, zero)
        codes = form.quantize(row, qparams(form, k))
        wanted = form.fake_quant(row, qparams(form, k)).to(torch.float64) @ values.to(torch.float64)
        assert torch.allclose(product(form, codes, values), wanted, rtol=1e-6, atol=1e-4)


def product(form: LogFormat, codes: Tensor, values: Tensor) -> Tensor:
    """The product by shifts."""
    if isinstance(form, LogSqrt2):
        return log_sqrt2_product(*log_sqrt2_matmul(codes, values, 8, form.zero_code), 8, 1.0)
    if isinstance(form, AdaLog):
        shifts, mantissas = form.shifts_and_mantissas(torch.arange(16), torch.tensor(20.0))
        total = adalog_matmul(codes, values, shifts, mantissas, form.zero_code)
        return log2_product(total, int(shifts.max()), 1 / form.denominator)
    return log2_product(log2_matmul(codes, values, 15, form.zero_code), 15, 1.0)


def test_too_small_a_greatest_shift_is_refused() -> None:
    with pytest.raises(FormatError, match="greater than the greatest one by 2: give a greater `most`"):
        log2_matmul(torch.tensor([[3, 7]]), torch.tensor([[1], [1]]), 5)


def test_sums_that_leave_64_bits_are_refused() -> None:
    with pytest.raises(FormatError, match="a shift by 60 leaves int64"):
        log2_matmul(torch.tensor([[0]]), torch.tensor([[1]]), 60)
    with pytest.raises(FormatError, match="leaves int64: cut the codes at a smaller shift"):
        log2_matmul(torch.zeros(1, 197, dtype=torch.int64), torch.full((197, 1), 127), 50)
