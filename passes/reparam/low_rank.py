"""linear(x, W, b)  →  linear(linear(x, Vᵀ W), V, V Vᵀ (b - μ) + μ)

LoRD: V holds the leading directions (orthonormal columns) of the linear's outputs y on calibration data, μ their mean. On that
data the mean squared error is the sum of the discarded eigenvalues of y's covariance. For any input at all the error is
at most |y - μ|, the distance of the output from the mean. An approximation: it runs only if asked for.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fxquant.passes.match import Match
from fxquant.passes.reparam.legality import FROZEN, FULL, UNTIED, are_frozen, are_full, are_untied, has_size
from fxquant.passes.rule import BOUNDED, Rule, Samples, bound

_BASIS = "V must have one row an output and μ one value an output, in the dtype of the weight"
_ORTHONORMAL = "the columns of V must be orthonormal"
_SAVES = "the rank must be below N·K/(N + K): else two products cost more than one"
TOLERANCE = 1e-4


def pattern(x: Any, weight: Any, bias: Any) -> Any:
    return linear(x, weight, bias)


def precondition(m: Match) -> Iterator[tuple[str, bool]]:
    yield FROZEN, are_frozen(m, "weight", "bias")
    yield FULL, are_full(m, "x", "weight", "bias")
    yield UNTIED, are_untied(m, "weight", "bias")
    n, k = m.weight.shape
    shapes = m.basis.dim() == 2 and has_size(m.basis[:, 0], n) and has_size(m.mean, n)
    yield _BASIS, shapes and m.basis.dtype == m.mean.dtype == m.weight.dtype
    yield _SAVES, m.basis.shape[1] * (n + k) < n * k
    yield _ORTHONORMAL, _is_orthonormal(m.data("basis"))


def _is_orthonormal(basis: Tensor | None) -> bool:
    if basis is None:
        return True
    wide = basis.to(torch.float64)
    unit = torch.eye(wide.shape[1], dtype=torch.float64)
    return bool(torch.allclose(wide.t() @ wide, unit, atol=TOLERANCE))


def rewrite(x: Tensor, weight: Tensor, bias: Tensor | None, basis: Tensor, mean: Tensor) -> Tensor:
    offset = -mean if bias is None else bias - mean
    moved = torch.matmul(basis, torch.matmul(basis.t(), offset)) + mean
    return linear(linear(x, torch.matmul(basis.t(), weight)), basis, moved)


def _holds(left: Tensor, right: Tensor, operands: Mapping[str, Any]) -> bool:
    from_mean = torch.linalg.vector_norm(left - operands["mean"], dim=-1)
    return bool((torch.linalg.vector_norm(left - right, dim=-1) <= from_mean * (1 + TOLERANCE)).all())


RULE = Rule(
    pattern,
    precondition,
    rewrite,
    shapes={"x": "b n*m", "weight": "k*d n*m", "bias": "k*d", "basis": "k*d r", "mean": "k*d"},
    error_class=BOUNDED,
    proof=bound("V Vᵀ is a projection, so |(1 - V Vᵀ)(y - μ)| ≤ |y - μ|", _holds),
    near_misses={
        FROZEN: {"weight": "k*d n*m"},
        FULL: dict.fromkeys(("x", "weight", "bias"), torch.bfloat16),
        UNTIED: {"weight": "tied"},
        _BASIS: {"mean": "k"},
        _SAVES: {"basis": "k*d k*d"},
        _ORTHONORMAL: {"basis": "k*d r"},
    },
    samples=Samples({"basis": "orthonormal"}),
    frozen=("weight", "bias"),
    vectors=("basis", "mean"),
)
