"""AdaRound: whether a weight goes up or down is learned on rows of the input.

Codes are ``clip(floor(w / s) + h(V), -m, m)`` with ``h = clip(σ(V) 1.2 - 0.1, 0, 1)``, V such that h starts at the fractional
part. Adam minimises the squared output error on batches of rows, plus λ Σ (1 - |2h - 1|^β), which drives h to 0 or 1: λ = 0
for the first 20 % of the iterations, then β falls linearly from 20 to 2. In the end h ≥ 1/2 goes up.

Ours: the output error is measured against that of nearest codes (times the number of weights), so that λ means the same for
every layer (3 here, 0.01 there); fewer iterations and more rows a batch, with a larger rate, than the published 20 000 of 32
images and 1e-3; it stops early where every h is decided; channels whose error on all rows did not fall keep nearest codes.
Symmetric here because the kernels are.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.calibration.rounding.grid import absmax_scale, as_matrix, encode, keep_better, largest_code
from fxquant.calibration.seen import Seen, see
from fxquant.errors import CalibrationError
from fxquant.reference import spread

HIGH, LOW = 1.1, -0.1  # ζ and γ of the paper
DECIDED = 1e-3  # so far from 0 or 1, h counts as decided


@dataclass(frozen=True)
class Options:
    """``progress(iteration, error)`` is told the batch's error relative to nearest codes; ``warm_up`` is a fraction."""

    iterations: int = 2000
    rate: float = 3e-2
    batch: int = 256
    weight: float = 3.0
    warm_up: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)
    check_every: int = 100
    seed: int = 0
    scale_of: Callable[[Tensor, int, int], Tensor] = absmax_scale
    progress: Callable[[int, float], None] | None = None


DEFAULT = Options()


def round_weight(weight: Tensor, bits: int, group: int, seen: Seen, options: Options = DEFAULT) -> tuple[Tensor, Tensor]:
    """codes int8 [N, K] and scale float32 [N] or [N, G]; needs rows, and float_rows where the goal is the float output.

    Raises:
        CalibrationError: there are no rows, or they do not fit.
    """
    weight = as_matrix(weight, group)
    rows = seen.need("rows", "adaround").to(torch.float32)
    if rows.dim() != 2 or rows.shape[1] != weight.shape[1] or not len(rows):
        raise CalibrationError(f"adaround wants rows [R, {weight.shape[1]}], not {tuple(rows.shape)}")
    goal = (rows if seen.float_rows is None else seen.float_rows.to(torch.float32)) @ weight.T
    scale = options.scale_of(weight, bits, group)
    nearest = encode(weight, scale, bits, group)
    steps = spread(scale, weight.shape[1], group)
    learned = _learn(weight / steps, steps, rows, goal, largest_code(bits), nearest, options)
    sampled = see(rows, seen.float_rows)
    return keep_better(weight, (learned, scale), (nearest, scale), group, sampled.need("hessian", "adaround"), sampled.cross)


def fraction_to_logit(fraction: Tensor) -> Tensor:
    """V with h(V) = fraction, for fractions in 0 .. 1."""
    return -torch.log((HIGH - LOW) / (fraction - LOW) - 1)


def soft_step(logit: Tensor) -> Tensor:
    """h(V) in 0 .. 1."""
    return (torch.sigmoid(logit) * (HIGH - LOW) + LOW).clamp(0, 1)


def penalty(step: Tensor, beta: float) -> Tensor:
    """Σ (1 - |2h - 1|^β)."""
    return (1 - (2 * step - 1).abs().pow(beta)).sum()


def beta_at(iteration: int, options: Options) -> float | None:
    """β, or None during the warm-up."""
    start = math.ceil(options.warm_up * options.iterations)
    if iteration < start:
        return None
    first, last = options.beta
    return first + (last - first) * (iteration - start) / max(1, options.iterations - start)


def _learn(ratio: Tensor, steps: Tensor, rows: Tensor, goal: Tensor, qmax: int, nearest: Tensor, options: Options) -> Tensor:
    """Learned codes int8 [N, K] for weights of ``ratio`` steps."""
    floor = torch.floor(ratio)
    unit = (rows @ (nearest * steps).T - goal).square().sum(1).mean()
    if float(unit) == 0:
        return nearest
    generator = torch.Generator().manual_seed(options.seed)
    with torch.enable_grad():
        logit = fraction_to_logit(ratio - floor).requires_grad_()
        adam = torch.optim.Adam([logit], options.rate)
        for iteration in range(options.iterations):
            picked = torch.randint(len(rows), (min(options.batch, len(rows)),), generator=generator)
            step = soft_step(logit)
            codes = (floor + step).clamp(-qmax, qmax)
            error = (rows[picked] @ (codes * steps).T - goal[picked]).square().sum(1).mean() / unit
            beta = beta_at(iteration, options)
            loss = error * ratio.numel()
            adam.zero_grad()
            (loss if beta is None else loss + options.weight * penalty(step, beta)).backward()
            adam.step()
            if iteration % options.check_every == 0 and _is_over(iteration, logit.detach(), float(error.detach()), options):
                break
    return (floor + (logit.detach() >= 0)).clamp(-qmax, qmax).to(torch.int8)


def _is_over(iteration: int, logit: Tensor, error: float, options: Options) -> bool:
    if options.progress is not None:
        options.progress(iteration, error)
    step = soft_step(logit)
    return bool((torch.minimum(step, 1 - step) < DECIDED).all())
