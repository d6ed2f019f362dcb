"""The scales of all weights tuned together against what the float model returns; codes stay as they are.

One batch a step: the float model runs it, the coded one runs it with gradients, Adam changes scales by relative amounts.
Outputs that are a linear's with more outputs than inputs (logits of a vocabulary, of many classes) are compared by KL(float ‖
coded), all others by the squared difference of a row relative to the row's square. Scales are few (one a group), so that
little data is enough, and every kernel reads them as they come. EfficientQAT (arXiv 2407.11062) tunes scales end to end in
its second phase, on the task's loss and with zero points; against the float model here.

Every fourth batch (``MOST_HELD`` at most) is only measured on, at the start and every ``check_every`` steps. ``EarlyStop``
states when that ends; scales that measured no better than at the start are not taken.

Memory: activations of one batch with gradients, and two float32 numbers a weight of the model.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxquant.budget import kl_error
from fxquant.calibration.reconstruction.block import held_out, learned, relative_error
from fxquant.calibration.reconstruction.coded import CodedLinear
from fxquant.calibration.reconstruction.early_stop import EarlyStop
from fxquant.calibration.reconstruction.soft import Scaled
from fxquant.calibration.reconstruction.walk import Walk
from fxquant.calibration.site import SiteCalibration

MOST_HELD = 4
BETAS = (0.9, 0.95)  # of Adam: few steps, so that the second moment has to follow quickly
_SAME = ("view", "reshape", "to", "_to_copy", "slice", "float", "clone", "contiguous", "alias")


@dataclass(frozen=True)
class Tuning:
    """``rate`` is the relative change of a scale in the first steps; it falls to 0 along a cosine after ``warm_up`` steps."""

    steps: int = 96
    rate: float = 5e-4
    warm_up: int = 5
    check_every: int = 12
    patience: int = 4

    def rate_at(self, step: int) -> float:
        """The rate of a step."""
        return self.rate * min(1.0, (step + 1) / self.warm_up) * (1 + math.cos(math.pi * step / self.steps)) / 2


@dataclass(frozen=True)
class Whole:
    """The model: a walk a batch at its beginning, all linears and their codes."""

    walks: Sequence[Walk]
    linears: Mapping[str, CodedLinear]
    found: Mapping[str, SiteCalibration]


def tune(model: Whole, how: Tuning, seed: int, report: Callable[[int, int], None]) -> dict[str, SiteCalibration]:
    """All sites with tuned scales, or as they were; ``report`` hears (steps done, steps at most)."""
    trained, held = held_out(len(model.walks), MOST_HELD)
    softs = {name: _scaled(model.linears[name], each) for name, each in model.found.items()}
    stop, adam = EarlyStop(how.patience), torch.optim.Adam([each.change for each in softs.values()], how.rate, BETAS)
    order = _order(len(trained), how.steps, seed)
    _measure(model, held, softs, stop)
    for step, which in enumerate(order):
        for group in adam.param_groups:
            group["lr"] = how.rate_at(step)
        adam.zero_grad()
        with torch.enable_grad():
            _error(model, trained[which], softs).backward()
        adam.step()
        report(step + 1, how.steps)
        if (step + 1) % how.check_every == 0 or step + 1 == how.steps:
            _measure(model, held, softs, stop)
            if stop.is_over:
                report(how.steps, how.steps)
                break
    return {name: model.linears[name].rounded(*codes) for name, codes in stop.best.items()}


def _scaled(linear: CodedLinear, known: SiteCalibration) -> Scaled:
    assert known.codes is not None
    scheme = linear.scheme
    return Scaled(known.codes.codes, known.codes.scale, scheme.weight_bits, scheme.group, learns_scale=True)


def _order(count: int, steps: int, seed: int) -> list[int]:
    """``steps`` numbers below ``count``: every one once in random order, then again."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-steps // count)
    return torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])[:steps].tolist()


def _measure(model: Whole, held: Sequence[int], softs: Mapping[str, Scaled], stop: EarlyStop) -> None:
    with torch.no_grad():
        errors = [float(_error(model, which, softs)) for which in held]
    stop.measure(sum(errors) / len(errors), {name: each.codes() for name, each in softs.items()})


def _error(model: Whole, which: int, softs: Mapping[str, Scaled]) -> Tensor:
    """The error of what one batch returns, differentiable in the scales."""
    walk = model.walks[which]
    study, end = walk.graph.study, len(walk.nodes)
    with torch.no_grad(), study.computing({}):
        wanted = walk.fork().advance(end).handed_on(0)
    with study.computing({name: learned(model.linears[name], each.value, 0.0, None) for name, each in softs.items()}):
        got = walk.fork().advance(end).handed_on(0)
    are_logits = [_is_logits(node) for node in _returned(walk)]
    pairs = zip(wanted, got, are_logits, strict=True)
    return sum(
        (kl_error(y, other).mean() if logits else relative_error(y, other) for y, other, logits in pairs), torch.zeros(())
    )


def _returned(walk: Walk) -> list[fx.Node]:
    """The nodes that the graph returns, tensors of floats, as ``handed_on`` lists them."""
    returned = walk.nodes[-1].args[0]
    nodes = returned if isinstance(returned, (tuple, list)) else [returned]
    return [node for node in nodes if isinstance(node, fx.Node) and node.meta["val"].is_floating_point()]


def _is_logits(node: fx.Node) -> bool:
    """Whether a value is a linear's with more outputs than inputs, sliced or converted at most."""
    while node.op == "call_function" and _name(node) in _SAME and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    if node.target is not torch.ops.aten.linear.default or not isinstance(node.args[1], fx.Node):
        return False
    outputs, inputs = node.args[1].meta["val"].shape
    return int(outputs) > int(inputs)


def _name(node: fx.Node) -> str:
    target = node.target
    return target.overloadpacket.__name__ if isinstance(target, torch._ops.OpOverload) else str(target)
