"""GPTQ: columns are rounded one after the other, and what one loses is made up for by those that follow.

With H = (2 / n) XᵀX, damped by ``damp`` times its mean diagonal, and U the upper factor of H⁻¹ = UᵀU, for j = 0, 1, ...::

    q = Q(w_j)        e = (w_j - q) / U_jj        W[:, j:] -= e U[j, j:]

in blocks of columns, so that what lies behind a block is updated by one product. arXiv 2210.17323 and its repository.

- An input that was never anything but zero (H_jj = 0) gets H_jj = 1 and weights 0.
- A group's scale is taken from the columns as they stand when the sweep reaches it; ``static_groups`` takes all scales from
  the weight as it came. ``act_order`` sweeps by falling H_jj; the kernels want groups of neighbours, so scales are static then.
- A Cholesky factor that does not exist is sought again with ten times the damping.
- max|w| / m is a poor scale at few bits; ``scale_of`` takes ``mse.choose_scale`` or, where scales are static,
  ``partial(hessian_weighted.choose_scale, seen=seen)``.
- GPTQ is greedy: a row whose error ½ ΔW H ΔWᵀ came out above that of nearest codes gets the nearest codes (ours).

Affine in the publication, symmetric here because the kernels are symmetric.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.calibration.rounding.grid import absmax_scale, as_matrix, encode, keep_better, largest_code
from fxquant.calibration.seen import Seen
from fxquant.errors import CalibrationError
from fxquant.reference import spread

STRONGER = 10.0  # times the damping, where the factor does not exist
ATTEMPTS = 5
Limits = tuple[int, int]  # the least and the greatest code


@dataclass(frozen=True)
class Options:
    """``scale_of(weight, bits, group)`` gives the scales; ``block`` columns are swept before the rest is updated; without
    ``keep_nearest`` the result is the publication's, a row worse than nearest codes or not."""

    damp: float = 0.01
    act_order: bool = False
    static_groups: bool = False
    scale_of: Callable[[Tensor, int, int], Tensor] = absmax_scale
    block: int = 128
    keep_nearest: bool = True


DEFAULT = Options()


def round_weight(weight: Tensor, bits: int, group: int, seen: Seen, options: Options = DEFAULT) -> tuple[Tensor, Tensor]:
    """codes int8 [N, K] and scale float32 [N] or [N, G].

    Raises:
        CalibrationError: there is no hessian of this size, or it is no covariance.
    """
    return solve(weight, bits, group, seen.need("hessian", "gptq"), None, 0.0, options)


def solve(
    weight: Tensor, bits: int, group: int, hessian: Tensor, cross: Tensor | None, strength: float, options: Options
) -> tuple[Tensor, Tensor]:
    """GPTQ, or with ``cross`` [K, K] and a strength above 0 GPTAQ."""
    weight = as_matrix(weight, group)
    _check(weight, hessian, cross)
    diagonal = hessian.diagonal()
    weight = torch.where(diagonal > 0, weight, 0.0)
    scale = options.scale_of(weight, bits, group)
    nearest = encode(weight, scale, bits, group), scale
    order = torch.argsort(diagonal, descending=True, stable=True) if options.act_order else torch.arange(len(diagonal))
    factor = inverse_factor(hessian[order][:, order], options.damp)
    push = None if cross is None else strength * push_matrix(factor, cross[order][:, order])
    is_static = options.act_order or options.static_groups or not group
    if is_static:
        steps = spread(scale, weight.shape[1], group)[:, order].to(torch.float64).T.contiguous()
        codes = torch.empty_like(nearest[0])
        codes[:, order] = sweep_columns(weight[:, order], steps, factor, push, _limits(bits), options.block)
        found = codes, scale
    else:
        found = _sweep_groups(weight, bits, group, factor, push, options)
    return keep_better(weight, found, nearest, group, hessian, cross) if options.keep_nearest else found


def inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """U float64 [K, K], upper, with UᵀU the inverse of the damped H: the inverse of H's factor from the last column on.

    Raises:
        CalibrationError: H is not positive, even with a damping that is ten times as strong five times over.
    """
    wide = hessian.to(torch.float64)
    diagonal = wide.diagonal()
    wide = wide + torch.diag((diagonal == 0).to(torch.float64))
    for attempt in range(ATTEMPTS):
        strength = damp * STRONGER**attempt * float(wide.diagonal().mean())
        damped = wide + strength * torch.eye(len(wide), dtype=torch.float64)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(failed):
            upper = lower.flip(0, 1)  # H = upper upperᵀ
            inverse: Tensor = torch.linalg.solve_triangular(upper, torch.eye(len(wide), dtype=torch.float64), upper=True)
            return inverse
    raise CalibrationError(
        f"the hessian [{len(wide)}, {len(wide)}] is not positive definite, even with {strength:.3g} added to its diagonal; "
        "it must be (2 / n) XᵀX of finite rows"
    )


def push_matrix(factor: Tensor, cross: Tensor) -> Tensor:
    """P = triu(D Uᵀ, 1) U [K, K], what GPTAQ adds for the difference between the float and the quantized input."""
    push: Tensor = torch.triu(cross.to(torch.float64) @ factor.T, 1) @ factor
    return push


def _limits(bits: int) -> Limits:
    return -largest_code(bits), largest_code(bits)


def _check(weight: Tensor, hessian: Tensor, cross: Tensor | None) -> None:
    k = weight.shape[1]
    for name, value in (("hessian", hessian), ("cross", cross)):
        if value is not None and (value.shape != (k, k) or not bool(torch.isfinite(value).all())):
            raise CalibrationError(f"{name} must be a finite [{k}, {k}] for this weight; it is {tuple(value.shape)}")


def sweep_columns(weight: Tensor, steps: Tensor, factor: Tensor, push: Tensor | None, limits: Limits, size: int) -> Tensor:
    """Codes int8 [N, K] of weight [N, K] with the steps [K, N] of its columns."""
    columns = weight.to(torch.float64).T.contiguous()  # [K, N]: a column lies in one piece
    codes = torch.empty_like(columns)
    for start in range(0, len(columns), size):
        rows = slice(start, min(start + size, len(columns)))
        codes[rows] = _sweep_block(columns, steps[rows], factor, push, limits, rows)
    return codes.T.to(torch.int8).contiguous()


def _sweep_groups(
    weight: Tensor, bits: int, group: int, factor: Tensor, push: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """Codes and scales [N, G], each group's scale from its columns as the sweep finds them; a block is a group."""
    columns = weight.to(torch.float64).T.contiguous()
    codes, scales = torch.empty_like(columns), []
    for start in range(0, len(columns), group):
        rows = slice(start, min(start + group, len(columns)))
        scales.append(options.scale_of(columns[rows].T.to(torch.float32), bits, 0))
        steps = scales[-1].to(torch.float64).expand(rows.stop - start, -1)
        codes[rows] = _sweep_block(columns, steps, factor, push, _limits(bits), rows)
    return codes.T.to(torch.int8).contiguous(), torch.stack(scales, 1)


def _sweep_block(columns: Tensor, steps: Tensor, factor: Tensor, push: Tensor | None, limits: Limits, rows: slice) -> Tensor:
    """Codes float64 [B, N] of the columns ``rows``; ``columns`` [K, N] behind them are updated in place."""
    block, inner = columns[rows].clone(), factor[rows, rows]
    codes, errors = torch.empty_like(block), torch.empty_like(block)
    for j, column in enumerate(block):  # block[j] is no longer changed, so it stays the weight before rounding
        codes[j] = torch.round(column / steps[j]).clamp(*limits)
        errors[j] = (column - codes[j] * steps[j]) / inner[j, j]
        block[j + 1 :].addr_(inner[j, j + 1 :], errors[j], alpha=-1)
        if push is not None:
            block[j + 1 :].addr_(push[rows, rows][j, j + 1 :], column)
    columns[rows.stop :] -= factor[rows, rows.stop :].T @ errors
    if push is not None:
        columns[rows.stop :] += push[rows, rows.stop :].T @ block
    return codes
