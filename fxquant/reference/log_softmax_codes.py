"""Logarithmic codes of a softmax straight from its logits, and integer products of such codes with coded values.

A = softmax(l) has ``-log2 A = (lse - l) log2(e)`` with lse = log Σ e^l, so the codes of ``formats.Log2``, ``LogSqrt2`` and
``AdaLog`` need no exp of an element (k = 1, 2 and 37 / q)::

    q = clip(rne(float32(k log2(e)) · (lse - l)), 0, top)

in float32, one subtraction and one product, each rounded: a kernel gives the same bits. The codes may differ by one from
those of the probabilities themselves where rounding of lse or of the product crosses a threshold. A scale δ of the
probabilities is a term of lse: pass lse + ln δ. ``top`` is the last code: the zero code, or the smallest level.

Products are exact integers, ``codes`` int64 [..., M, J] and ``values`` int64 [..., J, D]; ``zero_code`` contributes nothing.
vit-quantizers section 1.
"""

import math

import torch
from torch import Tensor

from fxquant.errors import FormatError

LOG2_E = math.log2(math.e)
MOST_SHIFT = 52  # times a mantissa of 9 bits this is still an int64
QUARTER = float(torch.tensor(math.log(4.0), dtype=torch.float32))


def codes_from_logits(logits: Tensor, lse: Tensor, k: float, top: int) -> Tensor:
    """int64 codes 0 .. top of float32 logits [..., N] with lse [..., 1]; ``top`` for a masked logit (-inf) or row."""
    factor = torch.tensor(k * LOG2_E, dtype=torch.float32)
    distance = (lse.to(torch.float32) - logits.to(torch.float32)).nan_to_num(nan=math.inf, posinf=math.inf)
    return torch.round(factor * distance).clamp(0, top).to(torch.int64)


def binary_codes_from_logits(logits: Tensor) -> Tensor:
    """``[l ≥ max l - ln 4]`` int64 of float32 logits [..., N]: the codes of ``formats.SoftmaxBinary``; 0 for a masked row."""
    most = logits.amax(-1, keepdim=True)
    return ((logits >= most - QUARTER) & torch.isfinite(most)).to(torch.int64)


def log2_matmul(codes: Tensor, values: Tensor, most: int, zero_code: int | None = None) -> Tensor:
    """``Σ v << (most - q)`` int64 [..., M, D]: the product is ``δ s_v 2^-most`` times it.

    ``most`` is at least the greatest code of a value other than zero.
    """
    return _exact_matmul(_weights(codes, most - codes, zero_code), values)


def log_sqrt2_matmul(codes: Tensor, values: Tensor, most: int, zero_code: int | None = None) -> tuple[Tensor, Tensor]:
    """``E = Σ v << (most - q / 2)`` over even codes, ``O = Σ v << (most - (q + 1) / 2)`` over odd ones, int64.

    The product is ``δ s_v 2^-most (E + √2 O)``; ``most`` is at least half of the greatest code, rounded up.
    """
    weights = _weights(codes, most - (codes + 1) // 2, zero_code)
    is_odd = codes % 2 == 1
    return _exact_matmul(weights.masked_fill(is_odd, 0), values), _exact_matmul(weights.masked_fill(~is_odd, 0), values)


def adalog_matmul(codes: Tensor, values: Tensor, shifts: Tensor, mantissas: Tensor, zero_code: int | None = None) -> Tensor:
    """``Σ (v mantissa[c]) << (most - shift[c])`` int64 with ``most`` the greatest shift of the table.

    The product is ``δ s_v 2^-most / F`` times it. ``shifts`` and ``mantissas`` int64 [codes] are those of
    ``formats.AdaLog.shifts_and_mantissas``, cut at the greatest code in use: x ≥ 1e-15 δ reaches no shift above 51.
    """
    entries = codes if zero_code is None else codes.masked_fill(codes == zero_code, 0)
    weights = _weights(codes, int(shifts.max()) - shifts[entries], zero_code)
    return _exact_matmul(weights * mantissas[entries], values)


def log2_product(total: Tensor, most: int, scale: float | Tensor) -> Tensor:
    """``scale 2^-most total`` float64, for ``log2_matmul``; scale = δ s_v (over F for ``adalog_matmul``)."""
    return total.to(torch.float64) * (scale * 2.0**-most)


def log_sqrt2_product(even: Tensor, odd: Tensor, most: int, scale: float | Tensor) -> Tensor:
    """``scale 2^-most (even + √2 odd)`` float64, for ``log_sqrt2_matmul``; scale = δ s_v."""
    return (even.to(torch.float64) + math.sqrt(2.0) * odd.to(torch.float64)) * (scale * 2.0**-most)


def _weights(codes: Tensor, shifts: Tensor, zero_code: int | None) -> Tensor:
    """``1 << shift`` int64, 0 for the zero code.

    Raises:
        FormatError: a code lies beyond the greatest one that ``most`` allows, or ``most`` is more than int64 allows.
    """
    is_zero = torch.zeros_like(codes, dtype=torch.bool) if zero_code is None else codes == zero_code
    shifts = shifts.masked_fill(is_zero, 0)
    if shifts.numel() and int(shifts.min()) < 0:
        raise FormatError(f"a code needs a shift greater than the greatest one by {-int(shifts.min())}: give a greater `most`")
    if shifts.numel() and int(shifts.max()) > MOST_SHIFT:
        raise FormatError(f"a shift by {int(shifts.max())} leaves int64: cut the codes so that none is above {MOST_SHIFT}")
    return (torch.ones_like(codes) << shifts).masked_fill(is_zero, 0)


def _exact_matmul(weights: Tensor, values: Tensor) -> Tensor:
    """``weights @ values``, int64.

    Raises:
        FormatError: the sum might leave int64.
    """
    if weights.numel() and values.numel():
        greatest = int(weights.amax()) * int(values.abs().amax()) * weights.shape[-1]
        if greatest >= 2**63:
            raise FormatError(f"a sum of up to 2^{greatest.bit_length()} leaves int64: cut the codes at a smaller shift")
    return weights @ values
