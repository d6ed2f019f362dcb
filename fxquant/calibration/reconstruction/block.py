"""Block reconstruction: the roundings of a block's linears learned together against what the float block hands on.

AdaRound and BRECQ with QDrop (arXiv 2203.05740): while learning, what enters the block is, number by number, the float model's
with probability ``drop`` and that of the quantized one otherwise, and so are the coded activations inside of it (a probability
of 1/2 is the QDrop paper's, unconfirmed). One batch a step. The error is that of every tensor that the block hands on, a row's
squared difference relative to the row's square, so that no outlier token rules.

Every fourth batch is not learned from but measured on, with hard codes, every ``check_every`` steps; ``EarlyStop`` states when
that ends. What a block starts from must not have seen those batches either; one whose measured error did not fall is rounded
by all batches. On few batches learned codes fit the batches better and unseen data worse, so that is often the case.

Memory: the live values of each batch at the block's beginning in both models and what it hands on, besides the activations of
one batch with gradients and three numbers a weight of the block.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, fx

from fxquant.calibration.reconstruction.coded import CodedLinear
from fxquant.calibration.reconstruction.early_stop import EarlyStop
from fxquant.calibration.reconstruction.soft import Rectified, Soft, Straight
from fxquant.calibration.reconstruction.statistics import Pairs
from fxquant.calibration.reconstruction.walk import Walk
from fxquant.calibration.site import SiteCalibration
from fxquant.calibration.study import Linear

HELD_OUT = 4  # every fourth batch
TINY = 1e-12
Place = Callable[[Walk], int]


@dataclass(frozen=True)
class Learning:
    """How roundings are learned. ``rate`` is that of the rounding parameter, ``scale_rate`` that of scales (0: they stay).

    ``weight`` is the greatest strength of AdaRound's penalty relative to the error at the start; β falls along ``beta`` after
    ``warm_up`` of the steps, without it the penalty is 0.
    """

    kind: Literal["rectified", "straight"] = "rectified"
    steps: int = 400
    rate: float = 5e-2
    scale_rate: float = 0.0
    drop: float = 0.5
    weight: float = 0.02
    warm_up: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)
    check_every: int = 50
    patience: int = 4

    def soft(self, linear: CodedLinear, codes: Tensor, scale: Tensor) -> Soft:
        """The learned form of a weight."""
        scheme, kind = linear.scheme, Rectified if self.kind == "rectified" else Straight
        return kind(linear.weight, codes, scale, scheme.weight_bits, scheme.group, self.scale_rate > 0)

    def beta_at(self, step: int) -> float | None:
        """β, or None while the penalty is 0."""
        start = self.warm_up * self.steps
        if step < start or self.kind != "rectified":
            return None
        return self.beta[0] + (self.beta[1] - self.beta[0]) * (step - start) / max(1.0, self.steps - start)


@dataclass(frozen=True)
class Block:
    """What is learned at once: walks that stand before it, where it ends, its linears and the codes so far."""

    pairs: Pairs
    end: Place
    linears: Mapping[str, CodedLinear]
    found: Mapping[str, SiteCalibration]


def learn_block(
    block: Block, how: Learning, seed: int, report: Callable[[int, int], None]
) -> dict[str, SiteCalibration] | None:
    """The sites of the block with learned codes, None where none measured better; ``report`` hears (steps done, at most)."""
    generator = torch.Generator().manual_seed(seed)
    goals = [goal_of(float_walk, block.end) for float_walk, _ in block.pairs]
    softs = {name: _soft(block.linears[name], each, how) for name, each in block.found.items()}
    trained, held = held_out(len(goals))
    stop = EarlyStop(how.patience)
    unit = _measure(block, goals, held, softs, stop)
    adam = _optimizer(softs.values(), how)
    for step in range(how.steps):
        _anneal(adam, step, how.steps)
        which = trained[int(torch.randint(len(trained), (), generator=generator))]
        with torch.enable_grad():
            error = _error(block, which, goals[which], softs, how.drop, generator) / max(unit, TINY)
            beta = how.beta_at(step)
            count = sum(each.rounding.numel() for each in softs.values())
            extra = 0.0 if beta is None else sum(each.penalty(beta) for each in softs.values()) * (how.weight / count)
            adam.zero_grad()
            (error + extra).backward()
        adam.step()
        report(step + 1, how.steps)
        if (step + 1) % how.check_every == 0 or step + 1 == how.steps:
            _measure(block, goals, held, softs, stop)
            if stop.is_over:
                report(how.steps, how.steps)
                break
    if stop.error == unit:
        return None
    return {name: block.linears[name].rounded(*codes) for name, codes in stop.best.items()}


def held_out(count: int, most: int | None = None) -> tuple[list[int], list[int]]:
    """(the batches that are learned from, those that are measured on): every fourth, ``most`` at most; all do both if few."""
    every = list(range(count))
    held = every[HELD_OUT - 1 :: HELD_OUT][:most] or every
    return [i for i in every if i not in held] or held, held


def goal_of(walk: Walk, end: Place) -> list[Tensor]:
    """What the block that a walk stands before hands on."""
    start = walk.place
    with torch.no_grad():
        return walk.fork().advance(end(walk)).handed_on(start)


def _soft(linear: CodedLinear, known: SiteCalibration, how: Learning) -> Soft:
    assert known.codes is not None
    return how.soft(linear, known.codes.codes, known.codes.scale)


def _optimizer(softs: Any, how: Learning) -> torch.optim.Adam:
    softs = list(softs)
    groups: list[dict[str, Any]] = [{"params": [each.rounding for each in softs], "lr": how.rate, "full": how.rate}]
    if how.scale_rate > 0:
        groups.append({"params": [each.change for each in softs], "lr": how.scale_rate, "full": how.scale_rate})
    return torch.optim.Adam(groups)


def _anneal(adam: torch.optim.Adam, step: int, steps: int) -> None:
    """Rates fall to a tenth along a line."""
    for group in adam.param_groups:
        group["lr"] = group["full"] * (1 - 0.9 * step / steps)


def _measure(
    block: Block, goals: Sequence[list[Tensor]], held: Sequence[int], softs: Mapping[str, Soft], stop: EarlyStop
) -> float:
    """The error of hard codes on the batches that are held out, told to ``stop`` with the codes."""
    hard = {name: each.codes() for name, each in softs.items()}
    values = {name: block.linears[name].rounded(*codes).codes for name, codes in hard.items()}
    weights = {name: each.value for name, each in values.items() if each is not None}
    with torch.no_grad():
        found = [float(_run(block, which, goals[which], weights, 0.0, None)) for which in held]
    error = sum(found) / len(found)
    stop.measure(error, hard)
    return error


def _error(
    block: Block, which: int, goal: list[Tensor], softs: Mapping[str, Soft], drop: float, generator: torch.Generator
) -> Tensor:
    return _run(block, which, goal, {name: each.value() for name, each in softs.items()}, drop, generator)


def _run(
    block: Block, which: int, goal: list[Tensor], weights: Mapping[str, Tensor], drop: float, generator: torch.Generator | None
) -> Tensor:
    """The error of one batch with these weights."""
    float_walk, coded_walk = block.pairs[which]
    walk, start = coded_walk.fork(), coded_walk.place
    if generator is not None and drop > 0:
        walk.values = mixed(float_walk.values, walk.values, drop, generator)
    overrides = {name: learned(block.linears[name], partial(given, weights[name]), drop, generator) for name in weights}
    with walk.graph.study.computing(overrides):
        got = walk.advance(block.end(walk)).handed_on(start)
    return sum((relative_error(y, other) for y, other in zip(goal, got, strict=True)), torch.zeros(()))


def relative_error(wanted: Tensor, got: Tensor) -> Tensor:
    """The mean over rows of the last axis of Σ (y - ŷ)² / Σ y²."""
    square = wanted.square().sum(-1)
    return ((got - wanted).square().sum(-1) / square.clamp_min(TINY)).mean()


def mixed(
    floats: Mapping[fx.Node, Any], coded: Mapping[fx.Node, Any], drop: float, generator: torch.Generator
) -> dict[fx.Node, Any]:
    """The coded values, each number that differs replaced by the float one with probability ``drop``."""
    found = dict(coded)
    for node, value in coded.items():
        other = floats.get(node)
        if value is other or not isinstance(value, Tensor) or not value.is_floating_point() or not isinstance(other, Tensor):
            continue
        found[node] = torch.where(torch.rand(value.shape, generator=generator) < drop, other, value)
    return found


def learned(linear: CodedLinear, value: Callable[[], Tensor], drop: float, generator: torch.Generator | None) -> Linear:
    """The linear with this weight; gradients pass its input's coding, numbers of which stay float with probability ``drop``."""

    def compute(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = linear.rows(x, is_coded=False)
        if not linear.scheme.is_weight_only:
            change = (linear.rows(x) - rows).detach()
            if generator is not None and drop > 0:
                change = torch.where(torch.rand(rows.shape, generator=generator) < drop, 0.0, change)
            rows = rows + change
        return torch.nn.functional.linear(rows, value(), linear.bias(bias)).to(x.dtype)

    return compute


def given(value: Tensor) -> Tensor:
    """The value, for what wants a function of it."""
    return value
