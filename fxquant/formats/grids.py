"""Grids: the values that codes stand for before any scale, and how a float32 number is rounded to one.

``FloatGrid`` has a sign, an exponent and a mantissa, with subnormals. Numbers are rounded half to even in units of the last
mantissa bit and saturate at ±maximum, ±inf too; the sign of a number that rounds to zero is kept, so that both zeros occur.
NaN becomes the NaN code where the grid has one, else code 0.

| grid | bias | maximum | least normal | least subnormal | inf, NaN |
|---|---|---|---|---|---|
| E5M2 | 15 | 57344 | 2^-14 | 2^-16 | both |
| E4M3 | 7 | 448 | 2^-6 | 2^-9 | NaN |
| E3M2 | 3 | 28 | 0.25 | 0.0625 | none |
| E2M3 | 1 | 7.5 | 1 | 0.125 | none |
| E2M1 | 1 | 6 | 1 | 0.5 | none |

The codes and values are those of OCP OFP8 1.0 (in its saturating mode) and OCP MX 1.0, as ``ml_dtypes`` has them.
``FixedGrid`` is MX's INT8, two's complement sixty-fourths; the code of -2 is never made (linear-layers section 12, confirmed).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from fxquant.errors import FormatError

MANTISSA_BITS = 23  # of float32
EXPONENT_BIAS = 127  # of float32
EXPONENT_FIELD = 0xFF << MANTISSA_BITS  # its bits in float32


class Grid(Protocol):
    """Values without a scale."""

    @property
    def bits(self) -> int:
        """Bits of a code."""

    @property
    def maximum(self) -> float:
        """The greatest finite value."""

    def encode(self, y: Tensor) -> Tensor:
        """Codes int64 of float32 y."""

    def decode(self, codes: Tensor) -> Tensor:
        """Values float32 of codes."""

    def nearest(self, y: Tensor) -> Tensor:
        """``decode(encode(y))`` without codes in between; NaN becomes 0."""


@dataclass(frozen=True)
class FloatGrid:
    """Sign, exponent and mantissa. ``special``: what the greatest codes are: all values, one NaN, or inf and NaN."""

    exponent_bits: int
    mantissa_bits: int
    bias: int
    special: Literal["none", "nan", "inf and nan"] = "none"

    def __post_init__(self) -> None:
        if self.exponent_bits < 1 or self.mantissa_bits < 0 or self.bits > 8:
            raise FormatError(f"{self}: a grid has 1 exponent bit or more and 8 bits or fewer in all")

    @property
    def name(self) -> str:
        """Such as ``e4m3``."""
        return f"e{self.exponent_bits}m{self.mantissa_bits}"

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def least_exponent(self) -> int:
        """That of the least normal number, and of the subnormals."""
        return 1 - self.bias

    @property
    def greatest_code(self) -> int:
        """The code of ``maximum``."""
        every = (1 << (self.bits - 1)) - 1
        return every - {"none": 0, "nan": 1, "inf and nan": 1 << self.mantissa_bits}[self.special]

    @property
    def maximum(self) -> float:
        ones = 1 << self.mantissa_bits
        exponent = (self.greatest_code >> self.mantissa_bits) - self.bias - self.mantissa_bits
        return float((ones + self.greatest_code % ones) * 2.0**exponent)

    def encode(self, y: Tensor) -> Tensor:
        """Codes int64: sign, exponent and mantissa from the top bit down."""
        size = torch.nan_to_num(y.abs(), nan=0.0, posinf=self.maximum).clamp_max(self.maximum)
        exponent = ((size.view(torch.int32) >> MANTISSA_BITS) - EXPONENT_BIAS).clamp_min(self.least_exponent)
        steps = torch.round(size / power_of_two(exponent - self.mantissa_bits)).to(torch.int64)
        code = ((exponent - self.least_exponent) << self.mantissa_bits).to(torch.int64) + steps
        if self.special != "none":
            code = torch.where(torch.isnan(y), (1 << (self.bits - 1)) - 1, code)
        return code + (torch.signbit(y).to(torch.int64) << (self.bits - 1))

    def decode(self, codes: Tensor) -> Tensor:
        """Values float32; those of codes above ``greatest_code`` are inf or NaN."""
        size = codes & ((1 << (self.bits - 1)) - 1)
        field, fraction = size >> self.mantissa_bits, size & ((1 << self.mantissa_bits) - 1)
        steps = fraction + ((field > 0).to(torch.int64) << self.mantissa_bits)
        exponent = field.clamp_min(1) - (self.bias + self.mantissa_bits)
        value = steps.to(torch.float32) * power_of_two(exponent)
        value = torch.where(size > self.greatest_code, float("nan"), value)
        if self.special == "inf and nan":
            value = torch.where(size == self.greatest_code + 1, float("inf"), value)
        return torch.where(codes >> (self.bits - 1) > 0, -value, value)

    def nearest(self, y: Tensor) -> Tensor:
        """The bits of a size's exponent alone are the power of two below it."""
        size = torch.nan_to_num(y.abs(), nan=0.0).clamp_max(self.maximum)
        power = (size.view(torch.int32) & EXPONENT_FIELD).view(torch.float32).clamp_min(2.0**self.least_exponent)
        unit = power * 2.0**-self.mantissa_bits
        return torch.copysign(torch.round(size / unit) * unit, y)


@dataclass(frozen=True)
class FixedGrid:
    """INT8 of MX: codes are bytes in two's complement, values sixty-fourths, -127/64 .. 127/64."""

    name: ClassVar[str] = "int8"
    bits: ClassVar[int] = 8
    greatest: ClassVar[int] = 127
    mantissa_bits: ClassVar[int] = 6

    @property
    def maximum(self) -> float:
        return self.greatest * 2.0**-self.mantissa_bits

    def encode(self, y: Tensor) -> Tensor:
        """Codes int64 0 .. 255."""
        steps = torch.round(torch.nan_to_num(y, nan=0.0) * 2**self.mantissa_bits)
        return steps.clamp(-self.greatest, self.greatest).to(torch.int64) & 0xFF

    def decode(self, codes: Tensor) -> Tensor:
        """Values float32."""
        return (codes - ((codes & 0x80) << 1)).to(torch.float32) * 2.0**-self.mantissa_bits

    def nearest(self, y: Tensor) -> Tensor:
        """No zero is negative."""
        steps = torch.round(torch.nan_to_num(y, nan=0.0) * 2**self.mantissa_bits)
        return (steps.clamp(-self.greatest, self.greatest) + 0.0) * 2.0**-self.mantissa_bits


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent, float32 and exact, for integers -127 .. 127; -127 is subnormal, and anything below is taken for it."""
    exponent = exponent.to(torch.int32)
    normal = (exponent + EXPONENT_BIAS) << MANTISSA_BITS
    bits = torch.where(exponent < 1 - EXPONENT_BIAS, 1 << (MANTISSA_BITS - 1), normal)
    return bits.view(torch.float32)


E5M2 = FloatGrid(5, 2, 15, "inf and nan")
E4M3 = FloatGrid(4, 3, 7, "nan")
E3M2 = FloatGrid(3, 2, 3)
E2M3 = FloatGrid(2, 3, 1)
E2M1 = FloatGrid(2, 1, 1)
INT8 = FixedGrid()
