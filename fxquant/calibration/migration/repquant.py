"""RepQuant's dual clipping: the upper and the lower end of every channel of a norm's output are clipped by learned fractions.

::

    u_c = σ(a_c) high_c    l_c = σ(d_c) low_c    s_c = (u_c - l_c) / (n - 1)        z_c = clip(rne(-l_c / s_c), 0, n - 1)

Two ends, because channels are skewed. Then the norm is reparameterized with (s, z), and the weight is rounded after that,
since its rounding must see the rescaled columns. Unconfirmed: no code was published; the parametrization, the start at
σ = 0.99, the objective of one linear's output (the publication: a block's) and the rates are ours.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.calibration.rounding.grid import straight_round
from fxquant.errors import CalibrationError
from fxquant.reference import SMALLEST

START = math.log(0.99 / 0.01)  # a logit of 0.99


@dataclass(frozen=True, eq=False)
class Clip:
    """Logits float32 [K] of the kept fraction of the upper and of the lower end; infinity keeps all of it."""

    upper: Tensor
    lower: Tensor


def qparams(low: Tensor, high: Tensor, clip: Clip, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point float32 [K] for extents with low ≤ 0 ≤ high. Without a gradient z is whole."""
    top, bottom = torch.sigmoid(clip.upper) * high, torch.sigmoid(clip.lower) * low
    scale = ((top - bottom) / (2**bits - 1)).clamp_min(SMALLEST)
    return scale, straight_round(-bottom / scale).clamp(0, 2**bits - 1)


def fake_quant(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """``s (clip(rne(x / s) + z, 0, n - 1) - z)`` for x [..., K], the rounding passed straight through by gradients."""
    codes = (straight_round(x / scale) + zero_point).clamp(0, 2**bits - 1)
    return (codes - zero_point) * scale


def learn(rows: Tensor, weight: Tensor, bits: int, iterations: int = 500, rate: float = 0.05, batch: int = 64) -> Clip:
    """The clip of rows [R, K] with the least squared error of rows Wᵀ; never worse on the rows than none at all.

    Raises:
        CalibrationError: the shapes do not fit.
    """
    if rows.dim() != 2 or rows.shape[1] != weight.shape[1] or not len(rows):
        raise CalibrationError(f"dual clipping of rows {tuple(rows.shape)} for a weight {tuple(weight.shape)} does not fit")
    low, high = rows.amin(0).clamp_max(0), rows.amax(0).clamp_min(0)
    goal, generator = rows @ weight.T, torch.Generator().manual_seed(0)
    whole = torch.full_like(low, math.inf)
    unit = _error(rows, goal, weight, low, high, Clip(whole, whole), bits)
    with torch.enable_grad():
        logits = torch.full((2, len(low)), START, requires_grad=True)
        adam = torch.optim.Adam([logits], rate)
        for _ in range(iterations):
            picked = torch.randint(len(rows), (min(batch, len(rows)),), generator=generator)
            error = _error(rows[picked], goal[picked], weight, low, high, Clip(logits[0], logits[1]), bits)
            adam.zero_grad()
            error.backward()
            adam.step()
    learned = Clip(logits[0].detach(), logits[1].detach())
    return learned if _error(rows, goal, weight, low, high, learned, bits) < unit else Clip(whole, whole)


def _error(x: Tensor, goal: Tensor, weight: Tensor, low: Tensor, high: Tensor, clip: Clip, bits: int) -> Tensor:
    return (fake_quant(x, *qparams(low, high, clip, bits), bits) @ weight.T - goal).square().mean()
