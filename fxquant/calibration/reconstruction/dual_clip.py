"""RepQuant's dual clipping: both ends of each channel's range are learned, each on its own, before channels become one.

    u_c = σ(a_c) max_c        l_c = σ(d_c) min_c        s_c = (u_c - l_c) / (2^b - 1)        z_c = rne(-l_c / s_c)
    x̂ = s_c (clip(rne(x / s_c) + z_c, 0, 2^b - 1) - z_c)

with gradient 1 through rne. max and min are the ends of the coding that a site has already (RepQ-ViT's percentiles). The goal
is what the float block hands on, ``‖block(x̂) - block(x)‖²``; all clipped inputs of a block are learned together, on float
inputs, with everything else in float. Two ends, since channels are skewed.

Unconfirmed: the publication (arXiv 2402.05628) has no public code; the form, σ = 0.99 at the start, QDrop's probability, Adam,
its rate and steps are a stand-in with the stated properties. Ours: a range that does not hold zero is clipped towards its
middle instead; every fourth batch is only measured on, and the best measured is kept.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.calibration.channel_coding import ChannelCoding, fake_quant
from fxquant.calibration.reconstruction.block import Block, Place, goal_of, held_out
from fxquant.calibration.reconstruction.coded import CodedLinear
from fxquant.calibration.reconstruction.early_stop import EarlyStop
from fxquant.calibration.reconstruction.order import Stage
from fxquant.calibration.reconstruction.walk import Walk
from fxquant.calibration.rounding.grid import straight_round
from fxquant.calibration.study import Linear
from fxquant.errors import CalibrationError
from fxquant.reference import SMALLEST

Report = Callable[[int, int], None]
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
    """The learnable range of C channels: ``low`` and ``high`` [C] are the ends wide open, ``opening`` is σ at the start."""

    def __init__(self, low: Tensor, high: Tensor, bits: int, opening: float = OPEN) -> None:
        if low.shape != high.shape or not bool((low <= high).all()):
            raise CalibrationError(
                f"a range of channels has low ≤ high of one shape, not {tuple(low.shape)}, {tuple(high.shape)}"
            )
        self.low, self.high, self.bits = low, high, bits
        self._middle = torch.where((low <= 0) & (high >= 0), 0.0, (low + high) / 2)
        start = math.inf if opening >= 1 else math.log(opening / (1 - opening))
        self.upper, self.lower = (torch.full_like(low, start).requires_grad_() for _ in range(2))

    @classmethod
    def of(cls, coding: ChannelCoding, bits: int) -> "DualClip":
        """The range of a coding."""
        low = -coding.zero_point * coding.scale
        return cls(low, low + (2**bits - 1) * coding.scale, bits)

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point [C], differentiable."""
        qmax = 2**self.bits - 1
        high = self._middle + torch.sigmoid(self.upper) * (self.high - self._middle)
        low = self._middle + torch.sigmoid(self.lower) * (self.low - self._middle)
        scale = (high / qmax - low / qmax).clamp_min(SMALLEST)
        return scale, straight_round(-low / scale)

    def fake_quant(self, x: Tensor) -> Tensor:
        """x [..., C] as its codes have it, differentiable in the ends."""
        return fake_quant(x, *self.qparams(), self.bits)

    def coding(self) -> ChannelCoding:
        """What was learned."""
        return ChannelCoding(*(each.detach() for each in self.qparams()))


def clip_block(block: Block, stages: Sequence[Stage], how: Clipping, seed: int, report: Report) -> dict[str, CodedLinear]:
    """The linears among ``stages`` whose inputs are coded by channels, with learned ends, which readers of one value share."""
    clips: dict[str, DualClip] = {}
    for stage in stages:
        shared: dict[int, DualClip] = {}
        for name in stage:
            coding, bits = block.linears[name].channel_coding, block.linears[name].scheme.act_bits
            if coding is not None:
                clips[name] = shared.setdefault(bits, DualClip.of(coding, bits))
    if clips:
        learn([walk for walk, _ in block.pairs], block.end, clips, how, seed, report)
    return {name: block.linears[name].with_channels(clip.coding()) for name, clip in clips.items()}


def learn(
    walks: Sequence[Walk], end: Place, clips: Mapping[str, DualClip], how: Clipping, seed: int, report: Report
) -> EarlyStop:
    """Learn the clips of sites in place, to the best that was measured; sites that read one value share theirs.

    ``walks`` are float ones that stand before the block. ``report`` hears (steps done, steps at most).
    """
    generator = torch.Generator().manual_seed(seed)
    goals = [goal_of(walk, end) for walk in walks]
    trained, held = held_out(len(goals))
    ends = [logit for clip in dict.fromkeys(clips.values()) for logit in (clip.upper, clip.lower)]
    stop, adam = EarlyStop(how.patience), torch.optim.Adam(ends, how.rate)

    def error(which: int, drop: float) -> Tensor:
        walk = walks[which].fork()
        with walk.graph.study.computing({name: _clipped(clip, drop, generator) for name, clip in clips.items()}):
            got = walk.advance(end(walk)).handed_on(walks[which].place)
        squares = [(y - other).square().sum(-1).mean() for y, other in zip(goals[which], got, strict=True)]
        return torch.stack(squares).sum()

    def measure() -> None:
        with torch.no_grad():
            errors = [float(error(which, 0.0)) for which in held]
        stop.measure(sum(errors) / len(errors), [each.detach().clone() for each in ends])

    measure()
    for step in range(how.steps):
        with torch.enable_grad():
            adam.zero_grad()
            error(trained[int(torch.randint(len(trained), (), generator=generator))], how.drop).backward()
        adam.step()
        report(step + 1, how.steps)
        if (step + 1) % how.check_every == 0 or step + 1 == how.steps:
            measure()
            if stop.is_over:
                report(how.steps, how.steps)
                break
    with torch.no_grad():
        for each, best in zip(ends, stop.best, strict=True):
            each.copy_(best)
    return stop


def _clipped(clip: DualClip, drop: float, generator: torch.Generator) -> Linear:
    """The float linear of a clipped input, numbers of which stay float with probability ``drop``."""

    def compute(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        coded = clip.fake_quant(x.to(torch.float32)).to(x.dtype)
        if drop > 0:
            coded = torch.where(torch.rand(x.shape, generator=generator) < drop, x, coded)
        return torch.nn.functional.linear(coded, weight, bias)

    return compute
