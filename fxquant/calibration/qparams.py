"""Static activation codes of a linear's input, per channel, with the scale folded into the weight.

With the factor f_k of each input channel and the scale s, zero point z of the whole tensor (uint, qmax = 2^b - 1)::

    q_k = clip(rne(x_k / (s f_k)) + z, 0, qmax)        W'_nk = W_nk f_k

``f_k = (range_k / max range)^α``: α = 0 is one scale for the tensor, α = 1 one for every channel. Channels with a small
range get finer codes, at the price of a weight whose columns differ more; the α of 0, 1/4, 1/2, 3/4, 1 with the lowest
predicted noise at the linear's output is taken. The predicted noise is that of rounding to a grid (a twelfth of the
squared step) for activations and weights.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fxquant.calibration.digested import Digested
from fxquant.reference import SMALLEST

EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class InputStatistics:
    """What was seen of one linear's input, float32 and float64.

    ``low`` and ``high`` [K]: the extent of each channel, zero among it. ``square`` [K]: the mean square of each channel.
    ``token_range_square``: the mean over tokens of the squared extent of a token.
    """

    low: Tensor
    high: Tensor
    square: Tensor
    token_range_square: float


@dataclass(frozen=True, eq=False)
class StaticQParams(Digested):
    """Factor [K], scale and zero point of a linear's input, with the noise that is predicted at the output for these and
    for dynamic quantization per token (mean square, the same unit). Equal where the digest is."""

    factor: Tensor
    scale: float
    zero_point: int
    exponent: float
    noise: float
    dynamic_noise: float

    def tensors(self) -> Mapping[str, Tensor]:
        """The factor."""
        return {"factor": self.factor}

    def about(self) -> dict[str, float]:
        """The numbers, by name."""
        return {name: getattr(self, name) for name in ("scale", "zero_point", "exponent", "noise", "dynamic_noise")}

    @property
    def noise_db(self) -> float | None:
        """Predicted noise of static against dynamic activations in dB; None where dynamic ones have none."""
        return 10 * math.log10(self.noise / self.dynamic_noise) if min(self.noise, self.dynamic_noise) > 0 else None

    @cached_property
    def steps(self) -> Tensor:
        """The step of every input channel, scale times factor, float32 [K]."""
        return (self.factor.to(torch.float32) * self.scale).clamp_min(SMALLEST)

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """What a static linear reads: steps float32 [K] and zero point int32 [1]."""
        return {"steps": self.steps, "zero_point": torch.tensor([self.zero_point], dtype=torch.int32)}


def choose_qparams(seen: InputStatistics, weight: Tensor, weight_bits: int, act_bits: int) -> StaticQParams:
    """The static qparams with the lowest predicted noise for a weight [N, K]."""
    candidates = (_with_exponent(seen, weight, weight_bits, act_bits, exponent) for exponent in EXPONENTS)
    return min(candidates, key=lambda qparams: qparams.noise)


def _with_exponent(seen: InputStatistics, weight: Tensor, weight_bits: int, act_bits: int, exponent: float) -> StaticQParams:
    qmax = 2**act_bits - 1
    extent = (seen.high - seen.low).clamp_min(SMALLEST)
    factor = (extent / extent.amax()).clamp_min(2.0**-20) ** exponent
    low, high = float((seen.low / factor).amin()), float((seen.high / factor).amax())
    scale = max(high / qmax - low / qmax, SMALLEST)
    zero_point = int(torch.round(torch.tensor(-low / scale)).clamp(0, qmax))
    columns = weight.to(torch.float64).square().sum(0)  # [K]
    folded = weight.to(torch.float64) * factor.to(torch.float64)
    act_noise = (columns * (scale * factor.to(torch.float64)).square()).sum() / 12
    noise = act_noise + _weight_noise(folded, weight_bits, seen.square / factor.to(torch.float64).square())
    dynamic = columns.sum() * seen.token_range_square / qmax**2 / 12
    dynamic = dynamic + _weight_noise(weight.to(torch.float64), weight_bits, seen.square)
    return StaticQParams(factor, scale, zero_point, exponent, float(noise), float(dynamic))


def _weight_noise(weight: Tensor, bits: int, square: Tensor) -> Tensor:
    """Mean square at the output of rounding a weight [N, K] per output channel, for inputs of mean square ``square`` [K]."""
    steps = weight.abs().amax(1) / (2 ** (bits - 1) - 1)
    noise: Tensor = steps.square().sum() * square.sum() / 12
    return noise
