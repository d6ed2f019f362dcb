"""The metric of a product's output: a linear ``x Wᵀ`` or a product of matrices per head, with one operand under search.

Data are bounded by the caller (``Reservoir``); the output is made in chunks of at most ``OUTPUT_CHUNK`` numbers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from fxquant.calibration.searches.metric import Candidates, Choice, Metric
from fxquant.calibration.searches.objectives import OutputObjective, output_mse
from fxquant.errors import CalibrationError
from fxquant.granularity import Granularity, PerChannel, PerTensor

OUTPUT_CHUNK = 1 << 22  # 16 MB of float32
Side = Literal["left", "right"]


@dataclass(frozen=True)
class Product:
    """``left`` [R, K] with a weight ``right`` [N, K]; or [batch, heads, R, K] with [batch, heads, K, N]. float32.

    ``gradient``, shaped like the output, is what ``hessian_weighted`` reads. Granularities: PerTensor; PerChannel(0) of a
    weight; PerChannel(1), which is per head, of four axes. Others have no part of the output of their own, so a search by
    the output cannot tell their blocks apart.
    """

    site: str
    left: Tensor
    right: Tensor
    left_granularity: Granularity
    right_granularity: Granularity
    objective: OutputObjective = output_mse
    gradient: Tensor | None = None

    def __post_init__(self) -> None:
        shapes = tuple(self.left.shape), tuple(self.right.shape)
        if (self.left.dim(), self.right.dim()) not in ((2, 2), (4, 4)):
            raise CalibrationError(f"{self.site}: a product is of two or of four axes on both sides, not of {shapes}")
        if not bool(torch.isfinite(self.left).all() and torch.isfinite(self.right).all()):
            raise CalibrationError(f"{self.site}: an operand has values that are not finite")
        if self.gradient is not None:
            self._check_gradient(self.gradient)

    def _check_gradient(self, gradient: Tensor) -> None:
        """At the very point that a loss compares with, its gradient is zero or rounding noise, which would weigh nothing."""
        expected = (*self.left.shape[:-1], self.right.shape[0] if self.is_linear else self.right.shape[-1])
        if gradient.shape != expected:
            shapes = f"{tuple(gradient.shape)}, the output {expected}"
            raise CalibrationError(f"{self.site}: the gradient is of shape {shapes}")
        if not bool(torch.isfinite(gradient).all()) or not bool(gradient.any()):
            way = "take it of a loss with labels, or after a perturbation"
            raise CalibrationError(f"{self.site}: the gradient is zero everywhere or not finite; {way}")

    @property
    def is_linear(self) -> bool:
        """Whether it is x Wᵀ."""
        return self.left.dim() == 2

    def granularity(self, side: Side) -> Granularity:
        """That of one operand."""
        return self.left_granularity if side == "left" else self.right_granularity

    def operand(self, side: Side) -> Tensor:
        """One operand."""
        return self.left if side == "left" else self.right

    def metric(self, side: Side, other: Choice | None = None) -> "OperandMetric":
        """Judges candidates for one side while the other is quantized as chosen, or exact."""
        across: Side = "right" if side == "left" else "left"
        value = self.operand(across)
        return OperandMetric(self, side, value if other is None else other.fake_quant(value, self.granularity(across)))

    def multiply(self, left: Tensor, right: Tensor) -> Tensor:
        """The output without bias, which no difference of outputs has; for ``cosine`` the bias is left out too."""
        return linear(left, right) if self.is_linear else left @ right

    def chunks(self) -> Iterator[slice]:
        """Slices of the first axis of the left operand (of both, per head)."""
        width = self.right.shape[0] if self.is_linear else self.left[0].numel() // self.left.shape[-1] * self.right.shape[-1]
        step = max(1, OUTPUT_CHUNK // width)
        return (slice(start, start + step) for start in range(0, len(self.left), step))


@dataclass(frozen=True)
class OperandMetric:
    """The mean of the product's objective over the part of the output that a block of ``side`` makes."""

    product: Product
    side: Side
    other: Tensor

    @property
    def site(self) -> str:
        """Name of the site, for errors."""
        return self.product.site

    @torch.no_grad()
    def losses(self, candidates: Candidates) -> Tensor:
        """float64 [C, B]."""
        product, granularity, axis = self.product, self.product.granularity(self.side), self._axis()
        total, count = torch.zeros((), dtype=torch.float64), 0
        for chunk in product.chunks():
            exact = product.multiply(product.left[chunk], self._of(chunk, product.right, "right"))
            gradient = None if product.gradient is None else product.gradient[chunk]
            mine = self._of(chunk, product.operand(self.side), self.side)
            across = self._of(chunk, self.other, "right" if self.side == "left" else "left")
            blocks, rows = granularity.blocks(mine), []
            for index in range(len(candidates)):
                value = granularity.restore(candidates.format.fake_quant(blocks, candidates.at(index)), mine)
                output = product.multiply(*((value, across) if self.side == "left" else (across, value)))
                errors = product.objective(exact, output, gradient)
                rows.append(_summed(errors, axis, self.site))
            total, count = total + torch.stack(rows), count + errors.numel()
        return total * total.shape[1] / count

    def _of(self, chunk: slice, operand: Tensor, side: Side) -> Tensor:
        """The part of an operand that a chunk reads: a weight is read whole."""
        return operand if self.product.is_linear and side == "right" else operand[chunk]

    def _axis(self) -> int | None:
        """The axis of the output along which the blocks lie; None for one block."""
        granularity = self.product.granularity(self.side)
        if isinstance(granularity, PerTensor):
            return None
        if isinstance(granularity, PerChannel):
            if self.product.is_linear and self.side == "right" and granularity.axis in (0, -2):
                return -1
            if not self.product.is_linear and granularity.axis in (1, -3):
                return 1
        raise CalibrationError(f"{self.site}: blocks of {granularity} have no part of the output; search on the tensor itself")


def _summed(errors: Tensor, axis: int | None, site: str) -> Tensor:
    if axis is None:
        return errors.sum().reshape(1)
    if axis == -1 and errors.shape[-1] == 1:
        raise CalibrationError(f"{site}: an objective of whole output rows cannot judge the rows of a weight one by one")
    return errors.sum([i for i in range(errors.dim()) if i != axis % errors.dim()])


def alternate(
    product: Product,
    start: tuple[Choice, Choice],
    left: Callable[[Metric], Choice],
    right: Callable[[Metric], Choice],
    *,
    rounds: int = 3,
) -> tuple[Choice, Choice]:
    """(left, right) after ``rounds`` of searching right, then left, each against the other as chosen last.

    ``start`` is what both are before, such as min-max. PTQ4ViT: weight, then input, 3 rounds; its base method 1 round.
    """
    chosen_left, chosen_right = start
    for _ in range(rounds):
        chosen_right = right(product.metric("right", chosen_left))
        chosen_left = left(product.metric("left", chosen_right))
    return chosen_left, chosen_right
