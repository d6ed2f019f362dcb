"""TanQ: uniform codes behind a tangent, 0 and δ being exact levels (DopQ-ViT).

::

    T1  q = rne((n - 1) arctan(tanθ x / δ) / θ)    x̂ = δ tan(θ q / (n - 1)) / tanθ
    T2  q = rne((n - 1) tan(θ x / δ) / tanθ)       x̂ = δ arctan(q tanθ / (n - 1)) / θ

T1 is finer near 0 than uniform codes and finer near δ than log2; T2 is finer near δ. θ → 0 is uniform in both.

    >>> import torch
    >>> form = TanQ(2)
    >>> form.levels({"scale": torch.ones(1, 1), "angle": torch.ones(1, 1)})
    tensor([[0.0000, 0.2223, 0.5052, 1.0000]])

Unconfirmed (vit-quantizers section 8): the formula itself, of which no text was available. T1 is the choice made there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.formats.base import Format, QParams
from fxquant.formats.log_codes import check_width
from fxquant.granularity import blockwise_extent
from fxquant.reference import SMALLEST

ANGLES = tuple(round(0.05 * step, 2) for step in range(1, 32))  # the candidates of θ
DEFAULT_ANGLE = 1.35


@dataclass(frozen=True)
class TanQ(Format):
    """Tangent codes, T1 or with ``is_inverse`` T2; qparams: scale δ and angle θ in (0, π / 2). Computed in float64."""

    width: int
    is_inverse: bool = False

    def __post_init__(self) -> None:
        check_width("TanQ", self.width, 8)

    @property
    def name(self) -> str:
        return f"tanq{'-inverse' if self.is_inverse else ''}-{self.width}"

    @property
    def bits(self) -> int:
        return self.width

    def fit(self, blocks: Tensor) -> QParams:
        """δ = the greatest value of every block, θ = 1.35 (this project's choice: the method searches ``ANGLES``)."""
        scale = blockwise_extent(blocks)[1].clamp_min(SMALLEST)
        return {"scale": scale, "angle": torch.full_like(scale, DEFAULT_ANGLE)}

    def quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """Codes int64 0 .. n - 1, rising with x."""
        part = (x.to(torch.float64).nan_to_num(nan=0.0) / qparams["scale"]).clamp(0, 1)
        steps = (self.code_count - 1) * _bend(part, qparams["angle"], to_tangent=self.is_inverse)
        return torch.round(steps).to(torch.int64)

    def dequantize(self, codes: Tensor, qparams: QParams) -> Tensor:
        """Values float32 of codes, rounded once."""
        part = codes.to(torch.float64) / (self.code_count - 1)
        return (_bend(part, qparams["angle"], to_tangent=not self.is_inverse) * qparams["scale"]).to(torch.float32)

    def slope(self, x: Tensor, value: Tensor, qparams: QParams) -> Tensor:
        """Slope of decoding at x̂ times slope of coding at x: rounding counts as identity."""
        ratio = _steepness(value / qparams["scale"], qparams["angle"], self.is_inverse)
        ratio = ratio / _steepness(x / qparams["scale"], qparams["angle"], self.is_inverse)
        return torch.where(self.passes(x, qparams), ratio.to(torch.float32), 0.0)


def _bend(part: Tensor, angle: Tensor, to_tangent: bool) -> Tensor:
    """0 .. 1 onto 0 .. 1: ``tan(θ p) / tanθ``, or its inverse ``arctan(p tanθ) / θ``; float64."""
    angle = angle.to(torch.float64)
    return torch.tan(angle * part) / torch.tan(angle) if to_tangent else torch.atan(part * torch.tan(angle)) / angle


def _steepness(part: Tensor, angle: Tensor, is_inverse: bool) -> Tensor:
    """The derivative of decoding at the value ``part``, up to a constant factor; float64."""
    angle, part = angle.to(torch.float64), part.to(torch.float64).clamp(0, 1)
    if is_inverse:
        return 1 / (1 + torch.tan(angle * part).square())
    return 1 + (part * torch.tan(angle)).square()
