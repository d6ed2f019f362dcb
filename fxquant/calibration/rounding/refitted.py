"""GPTQ whose goal is a given output, and whose scales are fitted again to the codes that it found.

1. With H = (2 / n) XᵀX and M = (2 / n) Xᵀ (Y - X Wᵀ), what W misses of the wanted output Y, the float weight that comes
   nearest to Y is ``W + ((H + ρ)⁻¹ M)ᵀ``: errors of the quantized layers before are made up for as far as the input tells
   them, and with ρ as far as that holds on unseen data. (GPTAQ, arXiv 2504.02692, does so column by column with a strength
   of 1/4; closed form here.)
2. GPTQ by falling H_jj with the scales of least squared error, weighted by H_jj. Weights with groups are streamed, and those
   kernels read all 2^b codes: a group's scale has the sign that gives its largest weight the code -2^(b-1), which is worth
   0.8 dB at 4 bits and groups of 128.
3. Codes q fixed, the scales of a row's groups that minimise ``(w - ŵ) H (w - ŵ)ᵀ`` solve ``A s = b`` with
   ``A_gh = q_g H_gh q_hᵀ`` and ``b_g = q_g H wᵀ``; steps 2 and 3 again from there. Each row keeps the best that it met.

λ is ``damp`` times the median of H's diagonal: the mean would be that of the largest outlier's square, and a decoder's first
token is thousands of times as large as the others. ρ is ``Seen.ridge`` times the same, λ where that is not known. Ours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.calibration.rounding.gptq import inverse_factor, sweep_columns
from fxquant.calibration.rounding.grid import as_matrix, largest_code, pick_rows, row_errors
from fxquant.calibration.rounding.search import best_scale, diagonal_metric, search_scale
from fxquant.calibration.seen import Seen
from fxquant.reference import SMALLEST, dequantize_weight, spread

SHRINKS = tuple(1 - i / 40 for i in range(20))
LEAST_RIDGE = 1e-6  # of the mean diagonal of A: rows whose codes of a group are all zero stay solvable
RIDGES = tuple(0.01 * 4**i for i in range(9))


@dataclass(frozen=True)
class Options:
    """``fits``: how often scales are fitted."""

    damp: float = 0.01
    fits: int = 2
    block: int = 128


DEFAULT = Options()


def round_weight(weight: Tensor, bits: int, group: int, seen: Seen, options: Options = DEFAULT) -> tuple[Tensor, Tensor]:
    """codes int8 [N, K] and scale float32 [N] or [N, G]; needs the hessian, and reads ``missing``.

    Raises:
        CalibrationError: there is no hessian, or it is no covariance.
    """
    hessian = damped(seen.need("hessian", "refitted"), options.damp)
    goal = as_matrix(weight, group).to(torch.float64)
    goal = torch.where(seen.need("hessian", "refitted").diagonal() > 0, goal, 0.0)
    if seen.missing is not None:
        held_back = hessian if seen.ridge is None else damped(seen.need("hessian", "refitted"), seen.ridge)
        goal = goal + torch.linalg.solve(held_back, seen.missing.to(torch.float64)).T
    narrow = goal.to(torch.float32)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor = inverse_factor(hessian[order][:, order], 0.0)
    scale = choose_scale(narrow, bits, group, hessian.diagonal())
    best, least = None, torch.full((len(goal),), torch.inf, dtype=torch.float64)
    for fit in range(options.fits + 1):
        steps = spread(scale, goal.shape[1], group)[:, order].to(torch.float64).T.contiguous()
        codes = torch.empty(goal.shape, dtype=torch.int8)
        codes[:, order] = sweep_columns(goal[:, order], steps, factor, None, code_limits(bits, group), options.block)
        best, least = _better(best, least, (codes, scale), goal, hessian, group)
        if fit < options.fits:
            scale = fit_scale(goal, codes, scale, hessian, group)
            best, least = _better(best, least, (codes, scale), goal, hessian, group)
    assert best is not None
    return best


def choose_ridge(seen: Seen, unseen: Seen) -> float:
    """Of ``RIDGES`` that with which (H + ρ)⁻¹ M of ``seen`` makes up for most of what ``unseen`` misses."""
    hessian = damped(seen.need("hessian", "refitted"), 0.0)
    values, basis = torch.linalg.eigh(hessian)
    found = basis.T @ seen.need("missing", "refitted")
    there = basis.T @ unseen.need("hessian", "refitted") @ basis
    wanted = basis.T @ unseen.need("missing", "refitted")

    def error(ridge: float) -> float:
        made_up = found / (values + ridge * _middle(hessian))[:, None]
        return float((made_up * (there @ made_up / 2 - wanted)).sum())

    return float(min(RIDGES, key=error))


def code_limits(bits: int, group: int) -> tuple[int, int]:
    """The least and the greatest code that the kernel of such a weight reads."""
    largest = largest_code(bits)
    return (-largest - 1, largest) if group else (-largest, largest)


def choose_scale(weight: Tensor, bits: int, group: int, diagonal: Tensor) -> Tensor:
    """The scale of least Σ h_k (w_k - ŵ_k)², float32 [N], or [N, G] with signs."""
    if not group:
        return search_scale(weight, bits, 0, SHRINKS, diagonal_metric(diagonal))
    low, high = code_limits(bits, group)
    narrow, found = diagonal.to(torch.float32), []
    for start in range(0, weight.shape[1], group):
        part, weights = weight[:, start : start + group], narrow[start : start + group]
        extreme = part.gather(1, part.abs().argmax(1, keepdim=True))[:, 0]
        scales = (torch.where(extreme != 0, extreme * (shrink / low), SMALLEST) for shrink in SHRINKS)
        found.append(best_scale(part, scales, (low, high), diagonal_metric(weights), slice(None)))
    return torch.stack(found, 1)


def damped(hessian: Tensor, damp: float) -> Tensor:
    """H + λ, float64; inputs that were always zero get 1."""
    wide = hessian.to(torch.float64)
    diagonal = wide.diagonal()
    is_dead = diagonal <= 0
    return wide + torch.diag(is_dead.to(torch.float64) + damp * _middle(wide))


def _middle(hessian: Tensor) -> float:
    """The median of the diagonal, of inputs that were not always zero."""
    alive = hessian.diagonal()[hessian.diagonal() > 0]
    return float(alive.median()) if len(alive) else 0.0


def fit_scale(weight: Tensor, codes: Tensor, scale: Tensor, hessian: Tensor, group: int) -> Tensor:
    """The scales of least error for given codes, float32 like ``scale``; one that would change its sign stays as it was."""
    size = group or weight.shape[1]
    wide = codes.to(torch.float64)
    parts = [slice(i, i + size) for i in range(0, weight.shape[1], size)]
    seen = torch.stack([wide[:, part] @ hessian[part] for part in parts], 1)  # [N, G, K]: q_g H_g
    square = torch.stack([(seen[:, :, part] * wide[:, None, part]).sum(2) for part in parts], 2)  # [N, G, G]
    right = (seen * weight.to(torch.float64)[:, None]).sum(2)
    ridge = LEAST_RIDGE * square.diagonal(dim1=1, dim2=2).mean(1).clamp_min(SMALLEST)
    found = torch.linalg.solve(square + ridge[:, None, None] * torch.eye(len(parts), dtype=torch.float64), right)
    found = found.to(torch.float32).view(scale.shape)
    return torch.where((found * scale.sign() > SMALLEST) & torch.isfinite(found), found, scale)


def _better(
    best: tuple[Tensor, Tensor] | None, least: Tensor, new: tuple[Tensor, Tensor], goal: Tensor, hessian: Tensor, group: int
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Row by row the pair of least error so far, and that error."""
    error = row_errors(goal, dequantize_weight(*new, group), hessian)
    if best is None:
        return new, error
    return pick_rows(error < least, new, best), torch.minimum(error, least)
