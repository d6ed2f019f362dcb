"""I&S-ViT's SOS, third stage, for one linear: the weight itself is tuned under a frozen scale, straight through the rounding.

Adam, rate 4e-5 falling to 0 along a cosine, 1000 iterations of 64 rows; the input is the quantized model's, the goal the float
model's output. The scale is chosen from the weight as it came and stays, so it is stale in the end by construction. Stage 1 is
the same without rounding the weight, stage 2 the reparameterization of the norm (``passes``).

The publication reconstructs whole blocks on 1024 images; a single linear here. Rows of weights whose error did not fall keep
the nearest codes (ours). Symmetric here because the kernels are.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.calibration.rounding.grid import absmax_scale, as_matrix, encode, keep_better, largest_code, straight_round
from fxquant.calibration.seen import Seen, see
from fxquant.reference import spread


@dataclass(frozen=True)
class Options:
    """``rate`` at the start; ``progress(iteration, error)`` is told the batch's mean squared error."""

    iterations: int = 1000
    rate: float = 4e-5
    batch: int = 64
    check_every: int = 100
    seed: int = 0
    scale_of: Callable[[Tensor, int, int], Tensor] = absmax_scale
    progress: Callable[[int, float], None] | None = None


DEFAULT = Options()


def round_weight(weight: Tensor, bits: int, group: int, seen: Seen, options: Options = DEFAULT) -> tuple[Tensor, Tensor]:
    """codes int8 [N, K] and scale float32 [N] or [N, G]; needs rows, and float_rows where the goal is the float output."""
    weight = as_matrix(weight, group)
    rows = seen.need("rows", "tuned").to(torch.float32)
    float_rows = rows if seen.float_rows is None else seen.float_rows.to(torch.float32)
    scale = options.scale_of(weight, bits, group)
    steps = spread(scale, weight.shape[1], group)
    tuned = _tune(weight, steps, largest_code(bits), rows, float_rows @ weight.T, options)
    sampled = see(rows, seen.float_rows)
    found, old = (encode(tuned, scale, bits, group), scale), (encode(weight, scale, bits, group), scale)
    return keep_better(weight, found, old, group, sampled.need("hessian", "tuned"), sampled.cross)


def _tune(weight: Tensor, steps: Tensor, qmax: int, rows: Tensor, goal: Tensor, options: Options) -> Tensor:
    generator = torch.Generator().manual_seed(options.seed)
    with torch.enable_grad():
        tuned = weight.clone().requires_grad_()
        adam = torch.optim.Adam([tuned], options.rate)
        for iteration in range(options.iterations):
            for each in adam.param_groups:
                each["lr"] = options.rate * (1 + math.cos(math.pi * iteration / options.iterations)) / 2
            picked = torch.randint(len(rows), (min(options.batch, len(rows)),), generator=generator)
            rounded = straight_round((tuned / steps).clamp(-qmax, qmax)) * steps
            error = (rows[picked] @ rounded.T - goal[picked]).square().mean()
            adam.zero_grad()
            error.backward()
            adam.step()
            if options.progress is not None and iteration % options.check_every == 0:
                options.progress(iteration, float(error.detach()))
    return tuned.detach()
