"""Twin uniform codes: two uniform ranges of n / 2 codes, the steps of which differ by a power of two (PTQ4ViT).

Softmax, h = n / 2, split 2^-k: small values have the step ``2^-k / (h - 1)``, great ones ``1 / (h - 1)``, so a product is
``v (magnitude << k · range)``. GELU: the negative range reaches to the minimum of GELU with the step ``0.16997 / h``, the
positive step is 2^m times that.

    >>> import torch
    >>> TwinSoftmax(3).levels({"split": torch.full((1, 1), 2.0)})
    tensor([[0.0000, 0.0833, 0.1667, 0.2500, 0.0000, 0.3333, 0.6667, 1.0000]])
    >>> TwinGelu(2).levels({"ratio": torch.full((1, 1), 3.0)})
    tensor([[ 0.0000,  0.6799, -0.0850, -0.1700]])

vit-quantizers section 4. The select form: the published fake-quant adds both parts. Two choices of this project: x = 2^-k
belongs to the small range, so that levels are coded as themselves, and an x above the split that the great range would
round to 0 (k ≥ b) is coded 2^-k, the top of the small range.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxquant.formats.adalog import GELU_SHIFT
from fxquant.formats.base import Format, QParams
from fxquant.formats.log_codes import check_width, powers_of_two
from fxquant.granularity import blockwise_extent

SPLITS = range(20)  # the published candidates of k
RATIOS = range(-5, 25)  # candidates of m


@dataclass(frozen=True)
class _TwinUniform(Format):
    """Two ranges that share the codes; ``kind`` is the first part of the name."""

    width: int
    kind: ClassVar[str]

    def __post_init__(self) -> None:
        check_width("twin uniform", self.width, 8)

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.width}"

    @property
    def bits(self) -> int:
        return self.width

    @property
    def half(self) -> int:
        """h: the codes of one range."""
        return 1 << (self.width - 1)


@dataclass(frozen=True)
class TwinSoftmax(_TwinUniform):
    """Twin uniform codes of 0 .. 1; qparams: split k, a whole number. The code is ``range h + magnitude``."""

    kind: ClassVar[str] = "twin-softmax"

    def fit(self, blocks: Tensor) -> QParams:
        """k = b - 1, the last split without a gap between the ranges: this project's choice, the method searches ``SPLITS``."""
        return {"split": torch.full_like(blocks[:, :1], self.width - 1, dtype=torch.float32)}

    def quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """Codes int64 0 .. n - 1, rising with x."""
        x, split, top = x.nan_to_num(nan=0.0), powers_of_two(-qparams["split"].to(torch.int64)), self.half - 1
        great = torch.round(x * top).clamp(0, top)
        small = torch.round(x / split * top).clamp(0, top)
        return torch.where((x > split) & (great > 0), self.half + great, small).to(torch.int64)

    def dequantize(self, codes: Tensor, qparams: QParams) -> Tensor:
        """``magnitude / (h - 1)``, times 2^-k in the small range; float32, rounded once."""
        split = powers_of_two(-qparams["split"].to(torch.int64))
        part = (codes % self.half).to(torch.float32) / (self.half - 1)
        return torch.where(codes >= self.half, part, part * split)


@dataclass(frozen=True)
class TwinGelu(_TwinUniform):
    """Twin uniform codes of GELU outputs; qparams: ratio m, a whole number.

    Codes 0 .. h - 1 are positive magnitudes, h .. 2 h - 1 the negative magnitudes 1 .. h, stored less one.
    """

    kind: ClassVar[str] = "twin-gelu"

    @property
    def step(self) -> float:
        """Δ of the negative range, exact in float32 up to the rounding of the constant."""
        return GELU_SHIFT / self.half

    def fit(self, blocks: Tensor) -> QParams:
        """The least ratio m that clips nothing."""
        high = blockwise_extent(blocks)[1]
        wanted = torch.ceil(torch.log2(high / (self.step * (self.half - 1))))
        return {"ratio": wanted.clamp(RATIOS[0], RATIOS[-1])}

    def quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """Codes int64 0 .. n - 1."""
        x, step = x.nan_to_num(nan=0.0), self._positive_step(qparams)
        positive = torch.round(x / step).clamp(0, self.half - 1)
        negative = torch.round(-x / self.step).clamp(0, self.half)
        return torch.where(negative > 0, self.half - 1 + negative, positive).to(torch.int64)

    def dequantize(self, codes: Tensor, qparams: QParams) -> Tensor:
        """``magnitude · step`` of the code's range, float32."""
        magnitude = codes.to(torch.float32)
        negative = (self.half - 1 - magnitude) * self.step
        return torch.where(codes >= self.half, negative, magnitude * self._positive_step(qparams))

    def _positive_step(self, qparams: QParams) -> Tensor:
        return powers_of_two(qparams["ratio"].to(torch.int64)) * self.step
