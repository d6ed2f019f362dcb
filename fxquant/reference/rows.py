"""A row program: slow, clear, and what the kernel must equal bit for bit. Everything is float32, x is [..., width].

Every multiplication, addition, division and square root rounds by itself, in the order written. Sums over a row keep 16
partial sums (value i goes to sum i mod 16, in order), which are then added 8 apart, 4 apart, 2 apart and 1 apart::

    layer_norm  ((x - mean) * (1 / sqrt(var + eps))) * weight + bias, mean = sum(x) / n, var = sum((x - mean)²) / n
    rms_norm    (x * (1 / sqrt(sum(x²) / n + eps))) * weight
    gelu        max(x, 0) - a * P(a)^8, a = min(|x|, 5.6): P(a)^8 approximates Φ(-a), or the sigmoid of the tanh form
    silu        max(x, 0) - a * (e / (1 + e)), a = min(|x|, 87), e = exp(-a) by Cephes' polynomial

Largest errors against float64 on all of [-20, 20], over max(1, |y|): gelu 2e-7 (erf) and 5e-7 (tanh), silu 2e-7.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fxquant.reference.linear import linear_dynamic, linear_static

LANES = 16
GELU_END = 5.6
# Minimax fits of the eighth roots, degree 8, lowest power first; the same numbers stand in lowering/cpu/program_math.h.
ERF = (
    0.9170039892196655, -0.09145741164684296, -0.03192807734012604, -0.0006719556986354291, 0.001504362327978015,
    3.4295029763597995e-05, -6.025763650541194e-05, 7.479553005396156e-06, -2.958819322884665e-07,
)  # fmt: skip
TANH = (
    0.9170063138008118, -0.09148606657981873, -0.03181830421090126, -0.00076504290336743, 0.0016309978673234582,
    9.974524436984211e-05, -0.00017889136506710202, 4.206760786473751e-05, -3.2761306556494674e-06,
)  # fmt: skip
EXP = (1.0, 1.0, 5.0000001201e-1, 1.6666665459e-1, 4.1665795894e-2, 8.3334519073e-3, 1.3981999507e-3, 1.9875691500e-4)


def row_sum(x: Tensor) -> Tensor:
    """The sum over the last dimension, in 16 lanes; the dimension stays with size 1."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % LANES)).unflatten(-1, (-1, LANES))
    sums = torch.zeros_like(padded[..., 0, :])
    for part in padded.unbind(-2):
        sums = sums + part
    half = LANES // 2
    while half:
        sums, half = sums[..., :half] + sums[..., half : 2 * half], half // 2
    return sums


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension."""
    mean = row_sum(x) / x.shape[-1]
    centred = x - mean
    y = centred * _reciprocal_root(row_sum(centred * centred) / x.shape[-1], eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm over the last dimension."""
    y = x * _reciprocal_root(row_sum(x * x) / x.shape[-1], eps)
    return y if weight is None else y * weight


def _reciprocal_root(mean_square: Tensor, eps: float) -> Tensor:
    # torch.sqrt of float32 is not always correctly rounded; through float64 it is.
    root = torch.sqrt((mean_square + torch.tensor(eps, dtype=torch.float32)).double()).float()
    return 1.0 / root


def gelu(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """GELU with the upper tail as the eighth power of a polynomial."""
    a = torch.where(x.abs() > GELU_END, torch.tensor(GELU_END), x.abs())
    p = torch.full_like(a, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        p = p * a + c
    for _ in range(3):
        p = p * p
    return relu(x) - a * p


def exponential(x: Tensor) -> Tensor:
    """exp(x) for -87 <= x <= 0."""
    n = (x * 1.44269504088896341 + 12582912.0) - 12582912.0
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    p = torch.full_like(r, EXP[7])
    for c in EXP[6:1:-1]:
        p = p * r + c
    p = (p * (r * r) + r) + 1.0
    exponent = torch.where(n.isnan(), 0, n).to(torch.int32)
    return p * ((exponent + 127) << 23).view(torch.float32)


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x))."""
    a = torch.where(x.abs() > 87.0, 87.0, x.abs())
    e = exponential(-a)
    return relu(x) - a * (e / (1.0 + e))


def relu(x: Tensor) -> Tensor:
    """max(x, 0); a value that is no number stays."""
    return torch.where(x < 0, 0.0, x)


def rows(
    inputs: Sequence[Tensor],
    weights: Sequence[tuple[Tensor, Tensor]],
    params: Sequence[Tensor],
    registers: Sequence[int],
    program: Sequence[int],
    constants: Sequence[float],
    outputs: Sequence[int],
) -> list[Tensor]:
    """fxquant::rows with each packed weight as its codes int8 [n, k] and scales float32 [n]."""
    from fxquant.ops.program import FIELDS, Op

    held: dict[int, Tensor] = {
        reg: inputs[place].flatten(0, -2) for reg, place in enumerate(registers[1::2]) if place >= 0
    }  # fmt: skip
    vector = dict(enumerate(params)).get
    for start in range(0, len(program), FIELDS):
        op, dst, a, b, first, second, third = program[start : start + FIELDS]
        x = held[a]
        match op:
            case Op.LINEAR:
                held[dst] = linear_dynamic(x, *weights[b], vector(first), third)
            case Op.LINEAR_STATIC:
                held[dst] = linear_static(x, *weights[b], vector(first), params[second], params[second + 1], third)
            case Op.LAYER_NORM:
                held[dst] = layer_norm(x, vector(first), vector(second), constants[third])
            case Op.RMS_NORM:
                held[dst] = rms_norm(x, vector(first), constants[third])
            case Op.GELU_ERF | Op.GELU_TANH:
                held[dst] = gelu(x, ERF if op == Op.GELU_ERF else TANH)
            case Op.SILU | Op.RELU:
                held[dst] = silu(x) if op == Op.SILU else relu(x)
            case Op.ADD | Op.MUL:
                held[dst] = x + held[b] if op == Op.ADD else x * held[b]
            case Op.ADD_ROW | Op.MUL_ROW:
                held[dst] = x + params[first].flatten() if op == Op.ADD_ROW else x * params[first].flatten()
    pairs = zip(outputs[::2], outputs[1::2], strict=True)
    return [held[reg].reshape(*inputs[like].shape[:-1], registers[2 * reg]) for reg, like in pairs]
