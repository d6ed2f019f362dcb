"""What the logarithmic formats share: exactly rounded logarithms, exact powers of two, and the codes below the last level.

A b-bit log format has n = 2^b codes and no zero among them, so each says what becomes of values below its range:

| zero policy | codes of positive values | below the range | fits into b bits |
|---|---|---|---|
| ``ref_extra`` | n | an exact zero, code n | no: n + 1 codes, b + 1 bits |
| ``reserve_top`` | n - 1 | an exact zero, code n - 1 | yes |
| ``saturate`` | n | the smallest level, code n - 1 | yes |

Published accuracies use ``ref_extra``; a kernel that claims b bits uses one of the others. vit-quantizers sections 1 and 3.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fxquant.errors import FormatError
from fxquant.formats.base import Format, QParams

ZeroPolicy = Literal["ref_extra", "reserve_top", "saturate"]

# the least mantissa fields ≥ 2^(1/2), 2^(1/4) and 2^(3/4); none of the three is a float32, so no tie exists
MANTISSA_ROOT2 = 0x3504F4
MANTISSA_ROOT4 = 0x1837F1
MANTISSA_ROOT4_CUBED = 0x5744FD


@dataclass(frozen=True)
class LogFormat(Format):
    """Codes that fall as x rises: code 0 is the greatest level, each next one is smaller by a factor."""

    width: int
    zero: ZeroPolicy = "ref_extra"

    def __post_init__(self) -> None:
        if self.zero not in get_args(ZeroPolicy):
            raise FormatError(f"the zero policy is one of {', '.join(get_args(ZeroPolicy))}, not {self.zero!r}")

    @property
    @abstractmethod
    def family(self) -> str:
        """The name without width and zero policy."""

    @property
    def name(self) -> str:
        return f"{self.family}-{self.width}-{self.zero}"

    @property
    def bits(self) -> int:
        """Bits of storage: one more than ``width`` if the zero is extra."""
        return (self.code_count - 1).bit_length()

    @property
    def code_count(self) -> int:
        return (1 << self.width) + (self.zero == "ref_extra")

    @property
    def zero_code(self) -> int | None:
        """The code of an exact zero, the last one; None if the format saturates."""
        return None if self.zero == "saturate" else self.code_count - 1

    @abstractmethod
    def rounded_log(self, x: Tensor, qparams: QParams) -> Tensor:
        """int64: the logarithm that is the code of x unless it lies outside of the codes; falls as x rises."""

    @abstractmethod
    def magnitudes(self, codes: Tensor, qparams: QParams) -> Tensor:
        """Values float32 of codes, as if none meant zero."""

    def quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """Codes int64 0 .. code_count - 1."""
        return self.rounded_log(x, qparams).clamp(0, self.code_count - 1)

    def dequantize(self, codes: Tensor, qparams: QParams) -> Tensor:
        """Values float32 of codes."""
        values = self.magnitudes(codes, qparams)
        return values if self.zero_code is None else values.masked_fill(codes == self.zero_code, 0.0)

    def slope(self, x: Tensor, value: Tensor, qparams: QParams) -> Tensor:
        """x̂ / x where x is not clipped: rounding of the logarithm counts as identity."""
        return torch.where(self.passes(x, qparams), value / x, 0.0)


def log2_codes(y: Tensor) -> Tensor:
    """``rne(-log2 y)`` int64 of float32 y ≥ 0, exact for every float32 above 0; more than 150 for 0.

    y = 2^e (1 + M / 2^23) gives -e - [M ≥ 0x3504F4].
    """
    exponent, mantissa = _fields(y)
    return -exponent - (mantissa >= MANTISSA_ROOT2).to(torch.int64)


def log_sqrt2_codes(y: Tensor) -> Tensor:
    """``rne(-2 log2 y)`` int64 of float32 y ≥ 0, exact for every float32 above 0; more than 300 for 0.

    y = 2^e (1 + M / 2^23) gives -2 e - [M ≥ 0x1837F1] - [M ≥ 0x5744FD].
    """
    exponent, mantissa = _fields(y)
    above = (mantissa >= MANTISSA_ROOT4).to(torch.int64) + (mantissa >= MANTISSA_ROOT4_CUBED).to(torch.int64)
    return -2 * exponent - above


def powers_of_two(exponents: Tensor) -> Tensor:
    """``2^exponent`` float32 of int64 exponents, exact where float32 has it, else 0 or inf."""
    exponents = exponents.clamp(-252, 252)  # two normal factors
    half = torch.div(exponents, 2, rounding_mode="floor")
    rest = exponents - half
    first, second = (((part + 127) << 23).to(torch.int32).view(torch.float32) for part in (half, rest))
    return first * second


def _fields(y: Tensor) -> tuple[Tensor, Tensor]:
    """Exponents and mantissa fields int64 of float32 y; subnormal numbers as if they were normal, 0 as 2^-151."""
    y = y.detach().to(torch.float32)
    is_small = y < torch.finfo(torch.float32).tiny
    bits = torch.where(is_small, y * 2.0**24, y).view(torch.int32).to(torch.int64)
    exponent = ((bits >> 23) & 0xFF) - 127 - 24 * is_small.to(torch.int64)
    return exponent, bits & 0x7FFFFF


def check_width(family: str, width: int, widest: int) -> None:
    """Refuses widths that are no format.

    Raises:
        FormatError: the width is not 2 .. widest.
    """
    if not 2 <= width <= widest:
        raise FormatError(f"{family} codes have 2 to {widest} bits, not {width}")
