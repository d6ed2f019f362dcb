"""I&S-ViT's SOS: the weights of a block are tuned in stages, first for coded activations, then for their own codes.

1. Activations coded, weights in float: ``tune_weights`` with input and goal of the float model.
2. Norms are reparameterized so that one activation scale serves all channels. A site's static steps and shift do that
   (``calibration.channel_coding``), and keep the function, so it is done from the beginning.
3. The tuned weights are coded under a scale chosen once: ``tune_codes``; the input is the quantized model's, the goal the float
   model's. The scale is stale in the end by construction.

Adam falling to 0 along a cosine, no decay, one rate for every weight in the units that it has behind a reparameterized norm.
The error is the squared difference of what the block hands on, summed over the second axis and averaged over the others. All of
this is as published (arXiv 2311.10126).

Not as published: 1000 steps at 4e-5 (200 for six bits) of 64 images there, 250 at 1.6e-4 here, so that the sum of all rates
is the same, each of one batch as it was given. Biases are not trained, since a calibration has none, and the part of the bias
that a shift leaves stays that of the weight as it came. Attention stays in float while blocks are tuned. Every fourth batch is
only measured on and the best measured is kept (ours).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from fxquant.calibration.reconstruction.block import Block, goal_of, held_out, learned
from fxquant.calibration.reconstruction.coded import CodedLinear
from fxquant.calibration.reconstruction.early_stop import EarlyStop
from fxquant.calibration.reconstruction.walk import Walk
from fxquant.calibration.rounding.grid import straight_round
from fxquant.calibration.rounding.refitted import code_limits
from fxquant.calibration.seen import Seen
from fxquant.calibration.site import SiteCalibration
from fxquant.reference import spread

if TYPE_CHECKING:
    from fxquant.calibration.recipes.base import Rounding


@dataclass(frozen=True)
class Stages:
    """Steps of each of the two stages that tune, each of a batch."""

    steps: int = 250
    rate: float = 1.6e-4
    check_every: int = 25
    patience: int = 4

    def rate_at(self, step: int) -> float:
        """The rate of a step."""
        return self.rate * (1 + math.cos(math.pi * step / self.steps)) / 2


Report = Callable[[int, int], None]


def tune_block(block: Block, rounding: "Rounding", how: Stages, seed: int, report: Report) -> dict[str, SiteCalibration]:
    """All stages: the sites of ``block.found``, whose activations are coded, with codes; ``rounding`` chooses the scales."""
    weights = tune_weights(block, how, seed, lambda step, steps: report(step, 2 * steps))
    found = {}
    for name, weight in weights.items():
        scheme = block.linears[name].scheme
        found[name] = block.linears[name].rounded(*rounding(weight, scheme.weight_bits, scheme.group, Seen(0)))
    coded = replace(block, found=found)
    return tune_codes(coded, weights, how, seed, lambda step, steps: report(steps + step, 2 * steps))


def tune_weights(block: Block, how: Stages, seed: int, report: Report) -> dict[str, Tensor]:
    """Stage 1: float weights [N, K] by site, in the units of ``CodedLinear.rows``."""
    own = {name: _Own(block.linears[name]) for name in block.found}
    best: dict[str, Tensor] = _tune(block, own, 0, how, seed, report, lambda each: each.value().detach())
    return best


def tune_codes(
    block: Block, weights: Mapping[str, Tensor], how: Stages, seed: int, report: Report
) -> dict[str, SiteCalibration]:
    """Stage 3: the sites of the block with codes of tuned weights; the scales are those in ``block.found``."""
    own = {name: _Rounded(block.linears[name], weights[name], known) for name, known in block.found.items()}
    best = _tune(block, own, 1, how, seed, report, lambda each: each.codes())
    return {name: block.linears[name].rounded(*codes) for name, codes in best.items()}


class _Own:
    """A weight [N, K] that is tuned; the parameter has the units that it has behind a reparameterized norm."""

    def __init__(self, linear: CodedLinear, weight: Tensor | None = None) -> None:
        self._unit = linear.unit
        self.parameter = ((linear.weight if weight is None else weight) / self._unit).requires_grad_()

    def value(self) -> Tensor:
        """The weight, differentiable."""
        return self.parameter * self._unit


class _Rounded(_Own):
    """The same under the rounding of codes with given scales."""

    def __init__(self, linear: CodedLinear, weight: Tensor, known: SiteCalibration) -> None:
        super().__init__(linear, weight)
        assert known.codes is not None
        scheme = linear.scheme
        self._scale, self._limits = known.codes.scale, code_limits(scheme.weight_bits, scheme.group)
        self._steps = spread(self._scale, weight.shape[1], scheme.group)

    def _codes(self) -> Tensor:
        return straight_round((super().value() / self._steps).clamp(*self._limits))

    def value(self) -> Tensor:
        return self._codes() * self._steps

    def codes(self) -> tuple[Tensor, Tensor]:
        """Codes int8 [N, K] and scale."""
        return self._codes().detach().to(torch.int8), self._scale


Tuned = TypeVar("Tuned", bound=_Own)


def _tune(
    block: Block,
    own: Mapping[str, Tuned],
    start: int,
    how: Stages,
    seed: int,
    report: Report,
    state: Callable[[Tuned], Any],
) -> Any:
    """The best state by site; ``start`` 0: the block's input is the float model's, 1: the quantized one's."""
    generator = torch.Generator().manual_seed(seed)
    goals = [goal_of(float_walk, block.end) for float_walk, _ in block.pairs]
    trained, held = held_out(len(goals))
    stop, adam = EarlyStop(how.patience), torch.optim.Adam([each.parameter for each in own.values()], how.rate)

    def error(which: int) -> Tensor:
        return _error(block, block.pairs[which][start].fork(), goals[which], own)

    def measure() -> None:
        with torch.no_grad():
            stop.measure(sum(float(error(which)) for which in held), {name: state(each) for name, each in own.items()})

    measure()
    for step in range(how.steps):
        adam.param_groups[0]["lr"] = how.rate_at(step)
        adam.zero_grad()
        with torch.enable_grad():
            error(trained[int(torch.randint(len(trained), (), generator=generator))]).backward()
        adam.step()
        report(step + 1, how.steps)
        if (step + 1) % how.check_every == 0 or step + 1 == how.steps:
            measure()
            if stop.is_over:
                report(how.steps, how.steps)
                break
    return stop.best


def _error(block: Block, walk: Walk, goal: list[Tensor], own: Mapping[str, Tuned]) -> Tensor:
    start = walk.place
    overrides = {name: learned(block.linears[name], each.value, 0.0, None) for name, each in own.items()}
    with walk.graph.study.computing(overrides):
        got = walk.advance(block.end(walk)).handed_on(start)
    squares = [(y - other).square() for y, other in zip(goal, got, strict=True)]
    return torch.stack([each.sum(1).mean() if each.dim() > 1 else each.mean() for each in squares]).sum()
