"""The codes that the integer kernels run, and the errors by which rounding methods are judged.

Symmetric, m = 2^(b-1) - 1, one scale an output channel (``group`` 0) or one a group of ``group`` neighbouring input features,
the last of which may be shorter: ``q = clip(rne(w / scale), -m, m)``, ``ŵ = q scale``. These are the codes of
``fxquant.reference`` for any scale; the methods of this package differ in the scale and in which neighbour they round to.
The published methods mostly use affine codes, with a zero point a group; symmetric here because the kernels are symmetric.

Scales are float32 [N] for group 0 and [N, G] for groups, codes int8 [N, K].
"""

import torch
from torch import Tensor

from fxquant.errors import CalibrationError
from fxquant.reference import SMALLEST, dequantize_weight, spread


def largest_code(bits: int) -> int:
    """m = 2^(b-1) - 1.

    Raises:
        CalibrationError: no kernel has such codes.
    """
    if not 2 <= bits <= 8:
        raise CalibrationError(f"weights are rounded to 2 to 8 bits, not {bits}")
    return int(2 ** (bits - 1) - 1)


def as_matrix(weight: Tensor, group: int) -> Tensor:
    """The weight in float32.

    Raises:
        CalibrationError: it is no finite matrix, or the group is negative.
    """
    if weight.dim() != 2 or 0 in weight.shape or not bool(torch.isfinite(weight).all()):
        raise CalibrationError(f"only finite weights [N, K] are rounded; this one has shape {tuple(weight.shape)}")
    if group < 0:
        raise CalibrationError(f"a group has at least one input feature (0: all of a channel), not {group}")
    return weight.detach().to(torch.float32)


def absmax_scale(weight: Tensor, bits: int, group: int) -> Tensor:
    """max|w| / m of every channel or group, the scale of ``reference.quantize_weight``: float32 [N] or [N, G]."""
    parts = weight.to(torch.float32).split(group or weight.shape[1], 1)
    scale = torch.stack([(part.abs().amax(1) / largest_code(bits)).clamp_min(SMALLEST) for part in parts], 1)
    return scale if group else scale[:, 0]


def encode(weight: Tensor, scale: Tensor, bits: int, group: int) -> Tensor:
    """The nearest codes int8 [N, K] for given scales."""
    qmax = largest_code(bits)
    steps = weight.to(torch.float32) / spread(scale, weight.shape[1], group)
    return torch.round(steps).clamp(-qmax, qmax).to(torch.int8)


def straight_round(x: Tensor) -> Tensor:
    """rne with gradient 1; the value is the very code."""
    return torch.round(x).detach() + (x - x.detach())


def row_errors(weight: Tensor, rounded: Tensor, hessian: Tensor, cross: Tensor | None = None) -> Tensor:
    """½ ΔW H ΔWᵀ of every row, float64 [N]: the mean over tokens of the squared output error, with ΔW = W - Ŵ.

    With ``cross`` D the output of the float model is the goal, as in GPTAQ: W D ΔWᵀ is added. A constant is left out then, so
    that only differences mean something.
    """
    delta = weight.to(torch.float64) - rounded.to(torch.float64)
    error: Tensor = (delta @ hessian.to(torch.float64) * delta).sum(1) / 2
    return error if cross is None else error + (weight.to(torch.float64) @ cross.to(torch.float64) * delta).sum(1)


def output_sqnr(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """Signal to noise of the linear's output in dB: Σ ½ W H Wᵀ over Σ ½ ΔW H ΔWᵀ."""
    signal = row_errors(weight, torch.zeros_like(weight), hessian).sum()
    return float(10 * torch.log10(signal / row_errors(weight, rounded, hessian).sum()))


def keep_better(
    weight: Tensor, new: tuple[Tensor, Tensor], old: tuple[Tensor, Tensor], group: int, hessian: Tensor, cross: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Row by row the codes and scales with the lower output error; ``old`` on a tie."""
    error, before = (row_errors(weight, dequantize_weight(*pair, group), hessian, cross) for pair in (new, old))
    return pick_rows(error < before, new, old)


def pick_rows(is_new: Tensor, new: tuple[Tensor, Tensor], old: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Codes and scales whose rows are those of ``new`` where ``is_new`` [N], else of ``old``."""
    shape = is_new.view(-1, *[1] * (new[1].dim() - 1))
    return torch.where(is_new[:, None], new[0], old[0]), torch.where(shape, new[1], old[1])
