"""I&S-ViT's SOS: the weights of a block are tuned in stages, first for coded activations, then for their own codes.

1. Activations coded, weights in float: ``tune_weights`` with input and goal of the float model.
2. Norms are reparameterized so that one activation scale serves all channels: ``passes.reparam`` does that.
3. Weights coded under a scale chosen once: ``tune_codes``; the input is the quantized model's, the goal the float model's. The
   scale is stale in the end by construction.

Adam, rate 4e-5 falling to 0 along a cosine, no decay. The error is the squared difference of what the block hands on, summed
over the second axis and averaged over the others. Weights and biases of linears are trained in the publication (arXiv
2311.10126), only weights here: a calibration has no biases. Every fourth batch is measured on, as for blocks; the best measured
is kept (ours).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxquant.calibration.reconstruction.block import Block, given, held_out, learned
from fxquant.calibration.reconstruction.early_stop import EarlyStop
from fxquant.calibration.reconstruction.soft import Straight
from fxquant.calibration.site import SiteCalibration
from fxquant.reference import spread


@dataclass(frozen=True)
class Stages:
    """1000 steps (200 for six bits), each of a batch."""

    steps: int = 1000
    rate: float = 4e-5
    check_every: int = 100
    patience: int = 4

    def rate_at(self, step: int) -> float:
        """The rate of a step."""
        return self.rate * (1 + math.cos(math.pi * step / self.steps)) / 2


Report = Callable[[int, int], None]


def tune_weights(block: Block, how: Stages, seed: int, report: Report) -> dict[str, Tensor]:
    """Stage 1: float weights [N, K] by site, in the units of ``CodedLinear.rows``."""
    weights = {name: block.linears[name].weight.clone().requires_grad_() for name in block.found}
    read = {name: partial(given, each) for name, each in weights.items()}
    best: dict[str, Tensor] = _tune(block, list(weights.values()), read, 0, how, seed, report, partial(_copies, weights))
    return best


def tune_codes(
    block: Block, weights: Mapping[str, Tensor], how: Stages, seed: int, report: Report
) -> dict[str, SiteCalibration]:
    """Stage 3: the sites of the block with codes of tuned weights; the scales are those in ``block.found``."""
    softs: dict[str, _Tuned] = {}
    for name, known in block.found.items():
        assert known.codes is not None
        scheme = block.linears[name].gathered.scheme
        softs[name] = _Tuned(weights[name], known.codes.codes, known.codes.scale, scheme.weight_bits, scheme.group)
    read = {name: each.value for name, each in softs.items()}
    best = _tune(block, [each.weight for each in softs.values()], read, 1, how, seed, report, partial(_codes, softs))
    return {name: block.linears[name].rounded(*codes) for name, codes in best.items()}


class _Tuned(Straight):
    """A weight in its own units, so that one rate is the same for every layer, as published."""

    def __init__(self, weight: Tensor, codes: Tensor, scale: Tensor, bits: int, group: int) -> None:
        super().__init__(weight, codes, scale, bits, group)
        self.weight = weight.clone().requires_grad_()
        self._steps = spread(scale, weight.shape[1], group)

    @property
    def rounding(self) -> Tensor:
        return self.weight

    def _soft_codes(self) -> Tensor:
        self.ratio = self.weight / self._steps
        return super()._soft_codes()

    def _hard_codes(self) -> Tensor:
        self.ratio = self.weight / self._steps
        return super()._hard_codes()


def _tune(
    block: Block,
    parameters: list[Tensor],
    read: Mapping[str, Callable[[], Tensor]],
    start: int,
    how: Stages,
    seed: int,
    report: Report,
    state: Callable[[], Any],
) -> Any:
    """The best state; ``start`` 0: the block's input is the float model's, 1: the quantized one's."""
    generator = torch.Generator().manual_seed(seed)
    goals = [pair[0].fork().advance(block.end(pair[0])).handed_on(pair[0].place) for pair in block.pairs]
    trained, held = held_out(len(goals))
    stop, adam = EarlyStop(how.patience), torch.optim.Adam(parameters, how.rate)

    def error(which: int) -> Tensor:
        return _error(block, block.pairs[which][start].fork(), goals[which], read)

    def measure() -> None:
        with torch.no_grad():
            stop.measure(sum(float(error(which)) for which in held), state())

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
                break
    return stop.best


def _error(block: Block, walk: Any, goal: list[Tensor], read: Mapping[str, Callable[[], Tensor]]) -> Tensor:
    start = walk.place
    with walk.graph.study.computing({name: learned(block.linears[name], value, 0.0, None) for name, value in read.items()}):
        got = walk.advance(block.end(walk)).handed_on(start)
    squares = [(y - other).square() for y, other in zip(goal, got, strict=True)]
    return torch.stack([each.sum(1).mean() if each.dim() > 1 else each.mean() for each in squares]).sum()


def _copies(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in weights.items()}


def _codes(softs: Mapping[str, "_Tuned"]) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: each.codes() for name, each in softs.items()}
