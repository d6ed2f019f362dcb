"""One-bit codes: attention probabilities {0, 1} by a threshold, weights and activations by sign (BiViT).

    >>> import torch
    >>> form = SoftmaxBinary()
    >>> form.fake_quant(torch.tensor([[0.5, 0.25, 0.12]]), form.fit(torch.tensor([[0.5, 0.25, 0.12]])))
    tensor([[1., 1., 0.]])
    >>> SignBinary().levels({"scale": torch.full((1, 1), 0.5), "center": torch.zeros(1, 1)})
    tensor([[-0.5000,  0.5000]])

vit-quantizers section 12.1, confirmed. On logits the threshold of probabilities is ``l ≥ max l - ln 4``: no exp is needed
(``reference.log_softmax_codes``).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.formats.base import Format, QParams
from fxquant.granularity import blockwise_extent
from fxquant.reference import SMALLEST

THRESHOLD = 0.25  # of the greatest probability of a row: the published regression


@dataclass(frozen=True)
class SoftmaxBinary(Format):
    """``x̂ = scale [x ≥ threshold]``, one block a row; qparams: threshold and scale (1 unless ``is_scaled``).

    The gradient is 1 everywhere: it goes to the softmax output, then through the softmax.
    """

    is_scaled: bool = False

    @property
    def name(self) -> str:
        return "softmax-binary" + ("-scaled" if self.is_scaled else "")

    @property
    def bits(self) -> int:
        return 1

    def fit(self, blocks: Tensor) -> QParams:
        """A quarter of the greatest value of every row; a row of zeros is coded as zeros."""
        threshold = (blockwise_extent(blocks)[1] * THRESHOLD).clamp_min(SMALLEST)
        scale = _mean_above(blocks, threshold) if self.is_scaled else torch.ones_like(threshold)
        return {"threshold": threshold, "scale": scale}

    def fit_by_descent(self, blocks: Tensor, rounds: int = 5) -> QParams:
        """``min ‖x - v b‖²`` by turns: ``v`` the mean of what b selects, ``b = [x ≥ v / 2]``, from b = 1."""
        scale = blocks.to(torch.float32).mean(-1, keepdim=True)
        for _ in range(rounds - 1):
            scale = _mean_above(blocks, scale / 2)
        threshold = (scale / 2).clamp_min(SMALLEST)
        return {"threshold": threshold, "scale": scale if self.is_scaled else torch.ones_like(scale)}

    def quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """Codes int64 0 and 1."""
        return (x >= qparams["threshold"]).to(torch.int64)

    def dequantize(self, codes: Tensor, qparams: QParams) -> Tensor:
        """``scale · code``, float32."""
        return codes.to(torch.float32) * qparams["scale"]

    def passes(self, x: Tensor, qparams: QParams) -> Tensor:
        """Everywhere."""
        return torch.ones_like(x, dtype=torch.bool)


@dataclass(frozen=True)
class SignBinary(Format):
    """``x̂ = scale sign(x - center)`` with sign(0) = 1; qparams: scale and center.

    For weights one block a row: ``fit`` gives center = the mean of the row and scale = mean |x| of the row as it is. For
    activations, ``is_activation``: center 0, scale 1, and the gradient is 1 where |x| < 1. Unconfirmed: the gradient of
    weights, taken as 1 everywhere.
    """

    is_activation: bool = False

    @property
    def name(self) -> str:
        return "sign-binary" + ("-activation" if self.is_activation else "")

    @property
    def bits(self) -> int:
        return 1

    def fit(self, blocks: Tensor) -> QParams:
        """Mean of magnitudes and mean of every row; 1 and 0 for activations."""
        rows = blocks.to(torch.float32)
        if self.is_activation:
            return {"scale": torch.ones_like(rows[:, :1]), "center": torch.zeros_like(rows[:, :1])}
        return {"scale": rows.abs().mean(-1, keepdim=True), "center": rows.mean(-1, keepdim=True)}

    def quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """Codes int64: 0 for -scale, 1 for scale."""
        return (x >= qparams["center"]).to(torch.int64)

    def dequantize(self, codes: Tensor, qparams: QParams) -> Tensor:
        """``scale (2 code - 1)``, float32."""
        return (2 * codes - 1).to(torch.float32) * qparams["scale"]

    def passes(self, x: Tensor, qparams: QParams) -> Tensor:
        """Everywhere, or for activations where |x| < 1."""
        return x.abs() < 1 if self.is_activation else torch.ones_like(x, dtype=torch.bool)


def _mean_above(blocks: Tensor, threshold: Tensor) -> Tensor:
    """The mean of the values ≥ threshold of every block, 0 where there is none."""
    chosen = (blocks >= threshold).to(torch.float32)
    return (blocks.to(torch.float32) * chosen).sum(-1, keepdim=True) / chosen.sum(-1, keepdim=True).clamp_min(1)
