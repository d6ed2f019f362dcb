"""What calibration data says of one linear's input: the statistics that rounding methods and migrations read.

Every field but ``tokens`` may be missing; a method that needs one names it. K is the number of input features, n the
number of rows (tokens) that were seen, X [n, K] those rows as the quantized model sees them, F [n, K] the same rows in the
float model.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fxquant.errors import CalibrationError

# A channel that a shift makes zero keeps what the rounding of float32 sums leaves of its second moment: less than this share.
CANCELLED = 1e-6
LEAST_SQUARE = 1e-40  # below it float32 sums of squares are not normal numbers


@dataclass(frozen=True, eq=False)
class Seen:
    """Statistics of a linear's input.

    ``hessian`` float64 [K, K]: (2 / n) XᵀX, the second derivative of the mean squared output error of one row of weights.
    ``cross`` float64 [K, K]: (2 / n) (F - X)ᵀ X, rows indexed by the channel of F - X (GPTAQ).
    ``missing`` float64 [K, N]: (2 / n) Xᵀ (Y - X Wᵀ), Y [n, N] the output that is wanted of the weight W (``refitted``).
    ``ridge``: how far making up for ``missing`` is held back, in medians of the hessian's diagonal (``refitted``).
    ``absmax``, ``mean_square``, ``mean_abs`` float32 [K] and ``mean`` float64 [K]: of each channel of X.
    ``rows`` float32 [R, K]: some rows of X, and ``float_rows`` [R, K]: the same rows of F where they differ.
    """

    tokens: int
    hessian: Tensor | None = None
    cross: Tensor | None = None
    missing: Tensor | None = None
    ridge: float | None = None
    absmax: Tensor | None = None
    mean: Tensor | None = None
    mean_square: Tensor | None = None
    mean_abs: Tensor | None = None
    rows: Tensor | None = None
    float_rows: Tensor | None = None

    def need(self, name: str, method: str) -> Tensor:
        """The statistic ``name``.

        Raises:
            CalibrationError: it was not collected.
        """
        value = getattr(self, name)
        if isinstance(value, Tensor):
            return value
        raise CalibrationError(f"{method} needs the statistic {name!r} of the input, which was not collected; there is {self}")

    def divided(self, factor: Tensor) -> "Seen":
        """The statistics of the input divided by ``factor`` [K], as after a migration."""
        wide = factor.to(torch.float64)

        def by(value: Tensor | None, divisor: Tensor) -> Tensor | None:
            return None if value is None else (value.to(torch.float64) / divisor).to(value.dtype)

        square = wide[:, None] * wide
        return Seen(
            tokens=self.tokens,
            hessian=by(self.hessian, square),
            cross=by(self.cross, square),
            missing=by(self.missing, wide[:, None]),
            ridge=self.ridge,
            absmax=by(self.absmax, wide),
            mean=by(self.mean, wide),
            mean_square=by(self.mean_square, wide.square()),
            mean_abs=by(self.mean_abs, wide),
            rows=by(self.rows, wide),
            float_rows=by(self.float_rows, wide),
        )

    def shifted(self, shift: Tensor) -> "Seen":
        """Of the input minus ``shift`` [K]: everything from the rows, or hessian and mean from those two where both are there.

        Raises:
            CalibrationError: there are no rows, and hessian or mean is missing.
        """
        if self.hessian is None or self.mean is None:
            return see(self.need("rows", "a shift") - shift)
        wide = shift.to(torch.float64)
        mixed = torch.outer(self.mean, wide)
        moved = self.hessian - 2 * (mixed + mixed.T - torch.outer(wide, wide))
        square = self.hessian.diagonal()
        varies = (moved.diagonal() > CANCELLED * square) & (square > LEAST_SQUARE)
        moved = torch.where(varies & varies[:, None], moved, 0.0)
        return Seen(self.tokens, hessian=moved, mean=self.mean - wide)

    def __str__(self) -> str:
        there = [each.name for each in fields(self) if isinstance(getattr(self, each.name), Tensor)]
        return f"Seen({self.tokens} tokens: {', '.join(there) or 'nothing'})"


def see(rows: Tensor, float_rows: Tensor | None = None) -> Seen:
    """Every statistic of X [n, K] that is all there in memory; ``float_rows`` is F."""
    if rows.dim() != 2 or not len(rows):
        raise CalibrationError(f"statistics are of rows [n, K] with n ≥ 1, not of a tensor of shape {tuple(rows.shape)}")
    x = rows.to(torch.float64)
    cross = None if float_rows is None else 2 / len(x) * (float_rows.to(torch.float64) - x).T @ x
    return Seen(
        tokens=len(x),
        hessian=2 / len(x) * x.T @ x,
        cross=cross,
        absmax=x.abs().amax(0).to(torch.float32),
        mean=x.mean(0),
        mean_square=x.square().mean(0).to(torch.float32),
        mean_abs=x.abs().mean(0).to(torch.float32),
        rows=rows,
        float_rows=float_rows,
    )
