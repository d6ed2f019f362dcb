"""Every input channel of a linear with an own scale and zero point, and how they become one coding of the tensor.

RepQ-ViT makes a coding per channel one of the whole tensor by reparameterizing the norm before. Here the linear does so for
itself, so that it holds whoever else reads the norm: with s_k, z_k of the channels and one zero point z̃ ::

    x'_k = x_k - s_k (z̃ - z_k)        q_k = clip(rne(x'_k / s_k) + z̃, 0, n - 1)  =  clip(rne(x_k / s_k) + z_k, 0, n - 1)

up to the rounding of x'. The steps s_k go into the weight and the shift into the bias, as ``calibration.site`` says. z̃ is a
whole number, where RepQ-ViT's code leaves the mean as it is: only whole ones keep the codes. vit-quantizers 5.3.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.calibration.qparams import StaticQParams
from fxquant.calibration.rounding.grid import straight_round
from fxquant.reference import SMALLEST

Middle = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class ChannelCoding:
    """Scale and whole zero point of every channel, float32 [K]."""

    scale: Tensor
    zero_point: Tensor

    def as_one(self, bits: int, middle: Middle = torch.mean) -> tuple[StaticQParams, Tensor]:
        """(static qparams, shift [K]): the same codes with one zero point.

        ``middle`` is the mean in RepQ-ViT and the median in DopQ-ViT. Which scale is the tensor's cannot change anything
        here: the steps of the channels are what is used.
        """
        zero_point = torch.round(middle(self.zero_point)).clamp(0, 2**bits - 1)
        scale = float(middle(self.scale).clamp_min(SMALLEST))
        static = StaticQParams(self.scale / scale, scale, int(zero_point), 1.0, 0.0, 0.0)
        return static, self.scale * (zero_point - self.zero_point)

    @classmethod
    def of(cls, static: StaticQParams, shift: Tensor) -> "ChannelCoding":
        """What ``as_one`` was of."""
        return cls(static.steps, torch.round(static.zero_point - shift / static.steps))

    def or_better(self, other: "ChannelCoding", rows: Tensor, bits: int) -> "ChannelCoding":
        """Channel by channel the one with the lower squared error on rows [R, K]; this one on a tie."""
        mine, theirs = (each.errors(rows, bits) for each in (self, other))
        wins = theirs < mine
        return ChannelCoding(torch.where(wins, other.scale, self.scale), torch.where(wins, other.zero_point, self.zero_point))

    def errors(self, rows: Tensor, bits: int) -> Tensor:
        """The squared error of every channel, float32 [K]."""
        return (fake_quant(rows, self.scale, self.zero_point, bits) - rows).square().sum(0)


def fake_quant(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """``s (clip(rne(x / s) + z, 0, n - 1) - z)`` for x [..., K], the rounding passed straight through by gradients."""
    codes = (straight_round(x / scale) + zero_point).clamp(0, 2**bits - 1)
    return (codes - zero_point) * scale
