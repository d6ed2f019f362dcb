"""Uniform codes of 2 to 8 bits.

Affine, n = 2^b codes: ``q = clip(rne(x / s) + z, 0, n - 1)``, ``x̂ = s (q - z)``, z a whole number in 0 .. n - 1.
Symmetric, m = 2^(b-1) - 1: ``q = clip(rne(x / s), -m, m)``, ``x̂ = s q``; the code is q + m, and the top code is unused.
With ``power_of_two`` the scale is the next power of two at or above, so that rescaling is a shift.

``rne`` rounds half to even, ``/`` is true division, everything in float32; the order of operations is that of the kernels
(``reference.linear``). vit-quantizers section 1, confirmed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.errors import FormatError
from fxquant.formats.base import Format, QParams
from fxquant.granularity import blockwise_extent
from fxquant.reference import SMALLEST


@dataclass(frozen=True)
class Uniform(Format):
    """Affine or symmetric uniform codes; qparams: scale and, if affine, zero_point."""

    width: int
    is_symmetric: bool = False
    power_of_two: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.width <= 8:
            raise FormatError(f"uniform codes have 2 to 8 bits, not {self.width}")

    @property
    def name(self) -> str:
        return ("symmetric" if self.is_symmetric else "affine") + str(self.width) + ("-pow2" if self.power_of_two else "")

    @property
    def bits(self) -> int:
        return self.width

    @property
    def qparam_bits(self) -> int:
        return 32 if self.is_symmetric else 32 + self.width

    @property
    def code_count(self) -> int:
        return (1 << self.width) - (1 if self.is_symmetric else 0)

    @property
    def qmax(self) -> int:
        """The greatest code of the affine form, the greatest magnitude of the symmetric one."""
        return (1 << (self.width - 1 if self.is_symmetric else self.width)) - 1

    def fit(self, blocks: Tensor) -> QParams:
        """Min-max, zero always among the levels."""
        return self.qparams(*blockwise_extent(blocks))

    def qparams(self, low: Tensor, high: Tensor) -> QParams:
        """Qparams for values in low .. high, float32, with low ≤ 0 ≤ high."""
        if self.is_symmetric:
            return {"scale": self._scale(torch.maximum(-low, high) / self.qmax)}
        scale = self._scale(high / self.qmax - low / self.qmax)
        return {"scale": scale, "zero_point": torch.round(-low / scale).clamp(0, self.qmax)}

    def quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """Codes int64 0 .. code_count - 1."""
        steps = torch.round(torch.nan_to_num(x, nan=0.0) / qparams["scale"])
        if self.is_symmetric:
            return (steps.clamp(-self.qmax, self.qmax) + self.qmax).to(torch.int64)
        return (steps + qparams["zero_point"]).clamp(0, self.qmax).to(torch.int64)

    def dequantize(self, codes: Tensor, qparams: QParams) -> Tensor:
        """``s (q - z)``, float32."""
        zero_point = self.qmax if self.is_symmetric else qparams["zero_point"]
        return (codes.to(torch.float32) - zero_point) * qparams["scale"]

    def nearest(self, x: Tensor, qparams: QParams) -> Tensor:
        """Codes are small whole numbers, which float32 holds: they need not become integers in between. No zero is negative."""
        steps = torch.round(x / qparams["scale"])
        if self.is_symmetric:
            return (steps.clamp(-self.qmax, self.qmax) + 0.0) * qparams["scale"]
        return ((steps + qparams["zero_point"]).clamp(0, self.qmax) - qparams["zero_point"]) * qparams["scale"]

    def _scale(self, scale: Tensor) -> Tensor:
        scale = scale.clamp_min(SMALLEST)
        return torch.exp2(torch.ceil(torch.log2(scale))) if self.power_of_two else scale
