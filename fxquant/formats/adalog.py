"""AdaLog: logarithmic codes whose base ``2^(q / 37)`` is searched, with an integer mantissa and a shift for every code.

::

    c = rne(-log2(clip(x / δ, 1e-15, 1)) · 37 / q)
    shift[c] = floor(c q / 37)    mantissa[c] = rne(2^(-(c q mod 37) / 37) F)    F = 2^(b + 1) - 2
    x̂ = δ 2^-shift[c] mantissa[c] / F

q = 37 is log2, q ≈ 18.5 is log√2. With a shift ς (the bias reparameterization after GELU) x + ς is coded and ς is taken off
again; ``GELU_SHIFT`` makes every GELU output nonnegative.

    >>> import torch
    >>> form = AdaLog(2, "reserve_top")
    >>> form.levels({"scale": torch.ones(1, 1), "base": torch.full((1, 1), 20.0)})
    tensor([[1.0000, 0.6667, 0.5000, 0.0000]])

vit-quantizers section 9.1 and 9.2, confirmed. The floor of 1e-15 is kept: with a small base and many codes zero is coded as
about 2^-50 instead of the zero code.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.formats.base import QParams
from fxquant.formats.log_codes import LogFormat, check_width, powers_of_two
from fxquant.granularity import blockwise_extent
from fxquant.reference import SMALLEST

PARTS = 37  # the base is 2^(q / PARTS)
BASES = range(10, 138)  # the published candidates of q; from 6 bits on smaller ones have less error
FLOOR = 1e-15
OCTAVES = 8  # that ``fit`` spreads the codes over
GELU_SHIFT = 0.16997124254703522  # -min GELU


@dataclass(frozen=True)
class AdaLog(LogFormat):
    """Adaptive-base logarithms; qparams: scale δ and base q, a whole number from 1.

    Codes are computed in float64; tests check them against exact arithmetic at every threshold of every base. x + ς is a
    float32 sum, x / δ a float32 quotient.
    """

    shift: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_width(self.family, self.width, 8)

    @property
    def family(self) -> str:
        return "adalog-shifted" if self.shift else "adalog"

    @property
    def denominator(self) -> int:
        """F: what mantissas are divided by."""
        return (2 << self.width) - 2

    def fit(self, blocks: Tensor) -> QParams:
        """δ = 1 (published for probabilities), or with a shift the greatest x + ς; q so that the codes span eight octaves.

        The starting base is this project's choice: the published method always searches it, among ``BASES``.
        """
        scale = torch.ones_like(blocks[:, :1], dtype=torch.float32)
        if self.shift:
            scale = (blockwise_extent(blocks)[1] + self.shift).clamp_min(SMALLEST)
        base = min(math.ceil(OCTAVES * PARTS / ((1 << self.width) - 1)), BASES[-1])
        return {"scale": scale, "base": torch.full_like(scale, base)}

    def rounded_log(self, x: Tensor, qparams: QParams) -> Tensor:
        """``rne(-log2(clip((x + ς) / δ, 1e-15, 1)) · 37 / q)``."""
        part = ((x + self.shift) / qparams["scale"]).to(torch.float64).nan_to_num(nan=1.0).clamp(FLOOR, 1.0)
        return torch.round(-torch.log2(part) * PARTS / qparams["base"].to(torch.float64)).to(torch.int64)

    def shifts_and_mantissas(self, codes: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
        """int64 tables of the shift product: ``shift[c]`` and ``mantissa[c]`` of codes int64 for base q."""
        steps = codes * base.to(torch.int64)
        part = torch.exp2(-(steps % PARTS).to(torch.float64) / PARTS)
        return steps // PARTS, torch.round(part * self.denominator).to(torch.int64)

    def magnitudes(self, codes: Tensor, qparams: QParams) -> Tensor:
        """``δ (2^-shift (mantissa / F))``."""
        shift, mantissa = self.shifts_and_mantissas(codes, qparams["base"])
        return powers_of_two(-shift) * (mantissa.to(torch.float32) / self.denominator) * qparams["scale"]

    def dequantize(self, codes: Tensor, qparams: QParams) -> Tensor:
        """Values float32 of codes; the zero code stands for -ς."""
        return super().dequantize(codes, qparams) - self.shift

    def slope(self, x: Tensor, value: Tensor, qparams: QParams) -> Tensor:
        """``(x̂ + ς) / (x + ς)`` where x is not clipped, with the value of the table."""
        return torch.where(self.passes(x, qparams), (value + self.shift) / (x + self.shift), 0.0)
