"""Statistics of a stage's input behind the coded part of a model, and what its output misses of the float model's.

With X [n, K] the rows as coded, F those of the float model, W the weight, R [n, N] what the value that the linear's output is
added to (a residual) lacks of its float counterpart::

    H = (2 / n) XᵀX        D = (2 / n) (F - X)ᵀ X        M = (2 / n) Xᵀ (F Wᵀ + R - X Wᵀ) = Dᵀ Wᵀ + (2 / n) Xᵀ R

so that a linear before a residual sum makes up for the error of the sum, not only for that of its own input. Rows of one
picture or text err alike, so that what makes up for errors fits the batches far better than unseen data: ``Seen.ridge`` is how
far it is held back, chosen on every fourth batch (the last one of fewer) by what the others say. 4 K² and 2 K N float64 numbers
a stage; rows are read a walk at a time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from fxquant.calibration.reconstruction.coded import CodedLinear
from fxquant.calibration.reconstruction.walk import Walk
from fxquant.calibration.rounding.refitted import choose_ridge
from fxquant.calibration.seen import Seen
from fxquant.errors import CalibrationError

aten = torch.ops.aten
HELD_OUT = 4  # every fourth batch
Pairs = Sequence[tuple[Walk, Walk]]  # (float, coded), both before the same stage
Gram = tuple[int, Tensor, Tensor]  # n, H, D; F is in the units of X


def see_stage(stage: Sequence[str], linears: Sequence[CodedLinear], pairs: Pairs) -> list[Seen]:
    """The statistics for each linear of a stage; those of the input are shared where the linears code it alike.

    Raises:
        CalibrationError: an input is not finite.
    """
    every = range(len(pairs))
    held = every[HELD_OUT - 1 :: HELD_OUT] or every[1:][-1:]
    seen = _see_pairs(stage, linears, [pairs[i] for i in every if i not in held])
    if not held:
        return seen
    unseen = _see_pairs(stage, linears, [pairs[i] for i in held])
    return [joined(one, other, choose_ridge(one, other)) for one, other in zip(seen, unseen, strict=True)]


def joined(one: Seen, other: Seen, ridge: float) -> Seen:
    """Hessian, cross and missing of both."""
    tokens = one.tokens + other.tokens

    def mean(name: str) -> Tensor:
        parts = [each.need(name, "joined") * (each.tokens / tokens) for each in (one, other)]
        return parts[0] + parts[1]

    return Seen(tokens, hessian=mean("hessian"), cross=mean("cross"), missing=mean("missing"), ridge=ridge)


def _see_pairs(stage: Sequence[str], linears: Sequence[CodedLinear], pairs: Pairs) -> list[Seen]:
    first = linears[0]
    shared = all(torch.equal(first.rows(_peek(stage[0], pairs)), each.rows(_peek(stage[0], pairs))) for each in linears[1:])
    known = _gram(stage[0], first, pairs) if shared else None
    return [_seen(name, each, known or _gram(name, each, pairs), pairs) for name, each in zip(stage, linears, strict=True)]


def _peek(name: str, pairs: Pairs) -> Tensor:
    """A few rows of the input, to compare codings by."""
    return pairs[0][1].input_of(name).flatten(0, -2)[:8]


def _gram(name: str, linear: CodedLinear, pairs: Pairs) -> Gram:
    k = linear.weight.shape[1]
    square, cross = torch.zeros(k, k, dtype=torch.float64), torch.zeros(k, k, dtype=torch.float64)
    count = 0
    for float_walk, coded_walk in pairs:
        x = linear.rows(coded_walk.input_of(name)).flatten(0, -2)
        if not bool(torch.isfinite(x).all()):
            raise CalibrationError(f"{name}: the input has values that are not finite; leave such batches out")
        f = linear.rows(float_walk.input_of(name), is_coded=False).flatten(0, -2)
        square += (x.T @ x).to(torch.float64)
        cross += (f.T @ x).to(torch.float64)
        count += len(x)
    return count, 2 / count * square, 2 / count * (cross - square)


def _seen(name: str, linear: CodedLinear, known: Gram, pairs: Pairs) -> Seen:
    count, hessian, cross = known
    missing = cross.T @ linear.weight.to(torch.float64).T
    for float_walk, coded_walk in pairs:
        lacks = _residual_lacks(name, float_walk, coded_walk)
        if lacks is not None:
            x = linear.rows(coded_walk.input_of(name)).flatten(0, -2)
            missing += 2 / count * (x.T @ lacks.flatten(0, -2).to(torch.float32)).to(torch.float64)
    return Seen(count, hessian=hessian, cross=cross, missing=missing)


def _residual_lacks(name: str, float_walk: Walk, coded_walk: Walk) -> Tensor | None:
    """R [..., N] in the units of the linear's output; None where its output is not added to anything that is known yet."""
    node = float_walk.site(name)
    user, gain = _only_user(node), None
    shape = (*float_walk.input_of(name).shape[:-1], int(node.meta["val"].shape[-1]))
    if user is not None and user.target is aten.mul.Tensor:  # LayerScale
        gain = _other(user, node, float_walk)
        if gain is None or gain.shape != shape[-1:]:
            return None
        node, user = user, _only_user(user)
    if user is None or user.target is not aten.add.Tensor or user.kwargs:
        return None
    wanted, there = (_other(user, node, walk) for walk in (float_walk, coded_walk))
    if wanted is None or there is None or wanted.shape != shape:
        return None
    lacks = wanted - there
    return lacks if gain is None else torch.where(gain != 0, lacks / gain, 0.0)


def _other(user: fx.Node, node: fx.Node, walk: Walk) -> Tensor | None:
    """The value of the operand that is not ``node``, if it is known."""
    others = [arg for arg in user.args if arg is not node]
    value = walk.values.get(others[0]) if len(others) == 1 and isinstance(others[0], fx.Node) else None
    return value if isinstance(value, Tensor) else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
