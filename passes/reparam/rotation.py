"""linear(rms_norm(linear(x, W, b) + linear(y, U, c)), V, d)  →  the same with RᵀW, b R, RᵀU, c R, V R for an orthogonal R

QuaRot and SpinQuant rotate the whole residual stream: what writes it is rotated, a norm without γ commutes with rotations, and
what reads it turns back. Outliers of single channels spread over all. LayerNorm becomes RMSNorm first: its mean is taken
off by those who write the stream.

The matrix that is handed over needs orthogonal columns of any length: R is it with the lengths divided out. New weights are
computed in float64 and rounded once. Of a matrix of whole numbers, such as Hadamard's, the sums are exact but for weights
2^19 times smaller than others of their row: then a rotated weight has the same bits on every machine.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm

from fxquant.passes.match import Match
from fxquant.passes.reparam.legality import FROZEN, FULL, UNTIED, are_frozen, are_full, are_untied, has_size
from fxquant.passes.rule import ALGEBRA, REAL, Rule, Samples, Sizes

_WEIGHTS = ("weight", "bias", "other_weight", "other_bias", "read_weight", "read_bias")
SQUARE = "R must be a square matrix of the stream's width, in the dtype of the weights"
ORTHOGONAL = "R must have orthogonal columns"
TOLERANCE = 1e-4


def pattern(
    x: Any,
    weight: Any,
    bias: Any,
    y: Any,
    other_weight: Any,
    other_bias: Any,
    size: Any,
    eps: Any,
    read_weight: Any,
    read_bias: Any,
) -> Any:
    stream = linear(x, weight, bias) + linear(y, other_weight, other_bias)
    return linear(rms_norm(stream, size, None, eps), read_weight, read_bias)


def is_orthogonal(rotation: Tensor | None) -> bool:
    """Whether RᵀR = 1 once every column has length 1; a matrix whose values are not known is trusted."""
    if rotation is None:
        return True
    unit = turn(rotation.to(torch.float64))
    return bool(torch.allclose(unit.t() @ unit, torch.eye(len(unit), dtype=torch.float64), atol=TOLERANCE))


def precondition(m: Match) -> Iterator[tuple[str, bool]]:
    yield FROZEN, are_frozen(m, *_WEIGHTS)
    yield FULL, are_full(m, "x", "y", *_WEIGHTS)
    yield UNTIED, are_untied(m, *_WEIGHTS)
    width = m.weight.shape[0]
    yield SQUARE, has_size(m.rotation, width, width) and m.rotation.dtype == m.weight.dtype
    yield ORTHOGONAL, is_orthogonal(m.data("rotation"))


def turn(rotation: Tensor) -> Tensor:
    """R [N, N] itself: the columns of the matrix handed over, each of length 1."""
    return (_wide(rotation) / _lengths(rotation)).to(rotation.dtype)


def turn_back(rotation: Tensor) -> Tensor:
    """Rᵀ [N, N]."""
    return turn(rotation).t()


def centred_turn(rotation: Tensor) -> Tensor:
    """``turn`` for values whose mean over the channels is to be taken off too."""
    wide = _wide(rotation)
    return ((wide - torch.mean(wide, 0, True)) / _lengths(rotation)).to(rotation.dtype)


def rows(weight: Tensor, rotation: Tensor) -> Tensor:
    """The weight [N, K] of a linear that writes the stream."""
    return (torch.matmul(_wide(rotation).t(), _wide(weight)) / _lengths(rotation).unsqueeze(1)).to(weight.dtype)


def columns(weight: Tensor, rotation: Tensor) -> Tensor:
    """The weight [N, K] of a linear that reads it; also a bias [N], an embedding [V, N] or a constant that is added."""
    return (torch.matmul(_wide(weight), _wide(rotation)) / _lengths(rotation)).to(weight.dtype)


def centred_rows(weight: Tensor, rotation: Tensor) -> Tensor:
    """``rows``, with the mean over the stream's channels taken off first."""
    wide, by = _wide(weight), _wide(rotation).t()
    made = torch.matmul(by, wide) - torch.sum(by, 1).unsqueeze(1) * torch.mean(wide, 0, True)
    return (made / _lengths(rotation).unsqueeze(1)).to(weight.dtype)


def centred_columns(weight: Tensor, rotation: Tensor) -> Tensor:
    """``columns``, with the mean over the stream's channels taken off first."""
    wide, by = _wide(weight), _wide(rotation)
    made = torch.matmul(wide, by) - torch.mean(wide, -1, True) * torch.sum(by, 0)
    return (made / _lengths(rotation)).to(weight.dtype)


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.float64)


def _lengths(rotation: Tensor) -> Tensor:
    """The length of each column, float64 [N]."""
    wide = _wide(rotation)
    return torch.sqrt(torch.sum(wide * wide, 0))


def rewrite(
    weight: Tensor,
    bias: Tensor | None,
    other_weight: Tensor,
    other_bias: Tensor | None,
    read_weight: Tensor,
    rotation: Tensor,
    **unused: Any,
) -> dict[str, Tensor]:
    changed = {"weight": rows(weight, rotation), "other_weight": rows(other_weight, rotation)}
    biases = {"bias": bias, "other_bias": other_bias}
    changed |= {name: columns(b, rotation) for name, b in biases.items() if b is not None}
    return changed | {"read_weight": columns(read_weight, rotation)}


RULE = Rule(
    pattern,
    precondition,
    rewrite,
    shapes={
        "x": "b k",
        "weight": "n k",
        "bias": "n",
        "y": "b m",
        "other_weight": "n m",
        "other_bias": "n",
        "read_weight": "e n",
        "read_bias": "e",
        "rotation": "n n",
    },
    error_class=REAL,
    proof=ALGEBRA,
    near_misses={
        FROZEN: {"weight": "n k"},
        FULL: dict.fromkeys(("x", "y", *_WEIGHTS), torch.bfloat16),
        UNTIED: {"read_weight": "tied"},
        SQUARE: {"rotation": "n k"},
        ORTHOGONAL: {"rotation": "n n"},
    },
    samples=Samples({"size": Sizes("n"), "eps": 1e-5, "rotation": "orthonormal"}),
    frozen=_WEIGHTS,
    reweights=True,
    vectors=("rotation",),
)
