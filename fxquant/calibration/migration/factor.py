"""What every factor has in common: limits, powers of two, heads that share a value, and the folding itself.

x W ᵀ = (x / f) (W f)ᵀ holds for any positive f; in float32 it is exact for powers of two.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fxquant.errors import CalibrationError

LEAST, GREATEST = 1e-4, 1e4


def guarded(factor: Tensor, absmax: Tensor | None = None) -> Tensor:
    """The factor in float32 within 1e-4 .. 1e4; 1 where it is not finite or where the channel (``absmax`` 0) is dead."""
    factor = torch.where(torch.isfinite(factor), factor, 1.0).to(torch.float32).clamp(LEAST, GREATEST)
    return factor if absmax is None else torch.where(absmax > 0, factor, 1.0)


def power_of_two(factor: Tensor) -> Tensor:
    """The nearest power of two in the logarithm: 2^rne(log2 f). Multiplying by it rounds nothing."""
    return torch.exp2(torch.round(torch.log2(factor)))


def column_absmax(weights: Sequence[Tensor]) -> Tensor:
    """max over all weights [N, K] that read the input, and their rows: float32 [K].

    Raises:
        CalibrationError: there is none, or they differ in K.
    """
    if not weights or len({weight.shape[-1] for weight in weights}) != 1:
        raise CalibrationError(f"a factor is for weights of one K; these are {[tuple(weight.shape) for weight in weights]}")
    return torch.cat([weight.to(torch.float32) for weight in weights]).abs().amax(0)


def divide_norm(gamma: Tensor, beta: Tensor | None, factor: Tensor) -> tuple[Tensor, Tensor | None]:
    """The affine of a norm whose output is divided by the factor; the same division is that of a linear's rows and bias."""
    shape = factor.view(-1, *[1] * (gamma.dim() - 1))
    return gamma / shape, None if beta is None else beta / factor


def share_heads(factor: Tensor, kv_heads: int, heads: int) -> tuple[Tensor, Tensor]:
    """For v → o under grouped queries: the factor [heads · d] of o made equal over each group, and v's [kv_heads · d].

    Query head h reads value head h // (heads / kv_heads); the geometric mean over a group is taken.

    Raises:
        CalibrationError: the heads do not divide.
    """
    if heads % kv_heads or factor.numel() % heads:
        raise CalibrationError(f"{factor.numel()} channels in {heads} heads that share {kv_heads} value heads do not divide")
    groups = factor.view(kv_heads, heads // kv_heads, -1)
    value = torch.exp(torch.log(groups).mean(1))
    return value.repeat_interleave(heads // kv_heads, 0).reshape(-1), value.reshape(-1)
