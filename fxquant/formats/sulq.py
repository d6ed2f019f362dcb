"""SULQ: a uniform quantizer behind a shifted log2 (I&S-ViT).

::

    Y = -log2(x + η)    q = clip(rne((Y - lo) / Δ), 0, n - 1)    E = rne(q Δ + lo)    x̂ = 2^-E - η

E is a whole number, so a product is a shift, and ``-η Σ v`` follows as one sum over v. Neighbouring codes may stand for the
same value, zero is coded as ``2^-E - η``, which may be negative, and values are not coded as themselves.

    >>> import torch
    >>> form = Sulq(2)
    >>> form.levels(form.fit_with(torch.tensor([[0.0, 1.0]]), 0.125))
    tensor([[0.8750, 0.3750, 0.1250, 0.0000]])

vit-quantizers section 7.1; the paper's form from third parties, its structure from the code. Unconfirmed: Δ with n - 1 (the
paper) where the published code runs with n and n + 1 codes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.formats.base import Format, QParams
from fxquant.formats.log_codes import check_width, powers_of_two
from fxquant.reference import SMALLEST

SHIFTS = (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.5, 1.0)  # the published candidates of η
DEFAULT_SHIFT = 0.01


@dataclass(frozen=True)
class Sulq(Format):
    """Shifted-log2 uniform codes; qparams: shift η, low (lo) and step (Δ). Codes are computed in float64."""

    width: int

    def __post_init__(self) -> None:
        check_width("SULQ", self.width, 8)

    @property
    def name(self) -> str:
        return f"sulq-{self.width}"

    @property
    def bits(self) -> int:
        return self.width

    def fit(self, blocks: Tensor) -> QParams:
        """``fit_with`` η = 0.01, this project's choice: the published method searches ``SHIFTS``."""
        return self.fit_with(blocks, DEFAULT_SHIFT)

    def fit_with(self, blocks: Tensor, shift: float) -> QParams:
        """lo and Δ from the extent of Y over blocks [blocks, n] ≥ 0 with η = shift."""
        least, most = torch.aminmax(blocks.to(torch.float32), dim=-1, keepdim=True)
        high, low = _logarithm(least, shift), _logarithm(most, shift)
        step = ((high - low) / (self.code_count - 1)).clamp_min(SMALLEST)
        return {"shift": torch.full_like(most, shift), "low": low.to(torch.float32), "step": step.to(torch.float32)}

    def quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """Codes int64 0 .. n - 1, falling as x rises."""
        return torch.round(self._steps(x, qparams)).clamp(0, self.code_count - 1).to(torch.int64)

    def exponents(self, codes: Tensor, qparams: QParams) -> Tensor:
        """``E = rne(q Δ + lo)`` int64: the shifts of codes."""
        return torch.round(codes.to(torch.float64) * qparams["step"] + qparams["low"].to(torch.float64)).to(torch.int64)

    def dequantize(self, codes: Tensor, qparams: QParams) -> Tensor:
        """``2^-E - η``, float32."""
        return powers_of_two(-self.exponents(codes, qparams)) - qparams["shift"]

    def landmarks(self, qparams: QParams) -> Tensor:
        """The middle of every code's interval: a level need not have a code of its own."""
        y = torch.arange(self.code_count) * qparams["step"].to(torch.float64) + qparams["low"]
        return (torch.exp2(-y) - qparams["shift"]).to(torch.float32).reshape(-1)

    def passes(self, x: Tensor, qparams: QParams) -> Tensor:
        """Where x > 0 and Y lies inside of lo .. hi."""
        steps = self._steps(x, qparams)
        return (x > 0) & (steps > 0) & (steps < self.code_count - 1)

    def slope(self, x: Tensor, value: Tensor, qparams: QParams) -> Tensor:
        """``(x̂ + η) / (x + η)`` where Y is not clipped: both roundings count as identity."""
        shift = qparams["shift"]
        return torch.where(self.passes(x, qparams), (value + shift) / (x + shift), 0.0)

    def _steps(self, x: Tensor, qparams: QParams) -> Tensor:
        y = _logarithm(x.nan_to_num(nan=0.0), qparams["shift"].to(torch.float64))
        return (y - qparams["low"]) / qparams["step"].to(torch.float64)


def _logarithm(x: Tensor, shift: Tensor | float) -> Tensor:
    """``-log2(x + η)`` float64; values below 0 count as 0."""
    return -torch.log2(x.to(torch.float64).clamp_min(0) + shift)
