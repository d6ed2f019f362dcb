"""RepQuant's dual clipping: both ends of each channel's range are learned, each on its own, before norms are reparameterized.

    u_c = σ(a_c) max_c        l_c = σ(d_c) min_c        s_c = (u_c - l_c) / (2^b - 1)        z_c = rne(-l_c / s_c)
    x̂ = s_c (clip(rne(x / s_c) + z_c, 0, 2^b - 1) - z_c)

with gradient 1 through rne. The goal is the float block's output, ``‖block(x̂) - block(x)‖²``. Two ends, since channels are
skewed.

Unconfirmed: the publication (arXiv 2402.05628) has no public code; the form, σ ≈ 0.99 at the start, Adam and its rate are a
stand-in with the stated properties. A channel whose range does not hold zero keeps zero as that end, as min-max qparams do.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.calibration.migration.repquant import fake_quant
from fxquant.calibration.reconstruction.early_stop import EarlyStop
from fxquant.calibration.rounding.grid import straight_round
from fxquant.errors import CalibrationError
from fxquant.reference import SMALLEST

OPEN = 0.99  # σ at the start


@dataclass(frozen=True)
class Clipping:
    """How ends are learned: Adam's steps and rate on the logits, QDrop's probability, and when it is measured and ends."""

    steps: int = 200
    rate: float = 1e-2
    drop: float = 0.5
    check_every: int = 20
    patience: int = 3


class DualClip:
    """The learnable range of C channels: ``low`` and ``high`` [C] are what was seen, ``opening`` is σ at the start."""

    def __init__(self, low: Tensor, high: Tensor, bits: int, opening: float = OPEN) -> None:
        if low.shape != high.shape or not bool((low <= high).all()):
            raise CalibrationError(
                f"a range of channels has low ≤ high of one shape, not {tuple(low.shape)}, {tuple(high.shape)}"
            )
        self.low, self.high, self.bits = low.clamp_max(0), high.clamp_min(0), bits
        start = math.inf if opening >= 1 else math.log(opening / (1 - opening))
        self.upper, self.lower = (torch.full_like(low, start).requires_grad_() for _ in range(2))

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point [C], differentiable."""
        high, low = torch.sigmoid(self.upper) * self.high, torch.sigmoid(self.lower) * self.low
        qmax = 2**self.bits - 1
        scale = (high / qmax - low / qmax).clamp_min(SMALLEST)
        return scale, straight_round(-low / scale)

    def fake_quant(self, x: Tensor) -> Tensor:
        """x [..., C] as its codes have it, differentiable in the ends."""
        return fake_quant(x, *self.qparams(), self.bits)


def learn(
    clip: DualClip, inputs: Sequence[Tensor], block: Callable[[Tensor], Tensor], how: Clipping = Clipping(), seed: int = 0
) -> EarlyStop:
    """Learn the ends in place, to the best that was measured over all inputs; ``block`` computes what follows, in float."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        goals = [block(x) for x in inputs]
    stop, adam = EarlyStop(how.patience), torch.optim.Adam([clip.upper, clip.lower], how.rate)
    _measure(clip, inputs, goals, block, stop)
    for step in range(how.steps):
        which = int(torch.randint(len(inputs), (), generator=generator))
        x = inputs[which]
        with torch.enable_grad():
            kept = torch.rand(x.shape, generator=generator) < how.drop
            error = (block(torch.where(kept, x, clip.fake_quant(x))) - goals[which]).square().sum(-1).mean()
            adam.zero_grad()
            error.backward()
        adam.step()
        if (step + 1) % how.check_every == 0 or step + 1 == how.steps:
            _measure(clip, inputs, goals, block, stop)
            if stop.is_over:
                break
    with torch.no_grad():
        clip.upper.copy_(stop.best[0])
        clip.lower.copy_(stop.best[1])
    return stop


def _measure(
    clip: DualClip, inputs: Sequence[Tensor], goals: Sequence[Tensor], block: Callable[[Tensor], Tensor], stop: EarlyStop
) -> None:
    with torch.no_grad():
        pairs = zip(inputs, goals, strict=True)
        errors = [float((block(clip.fake_quant(x)) - goal).square().sum(-1).mean()) for x, goal in pairs]
    stop.measure(sum(errors) / len(errors), (clip.upper.detach().clone(), clip.lower.detach().clone()))
