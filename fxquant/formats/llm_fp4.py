"""LLM-FP4 (FPQ, arXiv 2310.16836): any split into E exponent and M mantissa bits, a real exponent bias, integer pre-shifts.

Values are ±2^-b · {2^(1-M) f where the exponent field p is 0, else 2^p (1 + f / 2^M)}, b real, without inf and NaN. The bias
for a greatest value is ``b = 2^E - log2(max) + log2(2 - 2^-M) - 1``; the qparam ``scale`` is 2^-b, so every b is an ordinary
scale of the grid with b = 0. E2M1 with b = 1 is OCP's FP4, E1M2 is the 4-bit symmetric integer, E3M0 the powers of two.
Numbers are rounded half to even in units of the last mantissa bit, as the published code does; without mantissa bits
every number half-way between two powers of two goes to the greater.

With ``shift`` the blocks are the input channels of one tensor, which share the real bias ρ = min b_c, and each has a whole
number β_c in 0 .. 2^E - 1 (qparam ``shift``): ``x̂ = 2^-β FP(2^β x; ρ)``, exactly. Two roundings are published:
``paper``: ``β = clip(rne(b_c - ρ), 0, 2^E - 1)``; ``code``: ``β = clip(rne(b_c), rne(ρ), rne(ρ) + 2^E - 1) - rne(ρ)``.

vit-quantizers section 10 and linear-layers section 13, confirmed. The searches of bias and split run on a layer's output and
belong to calibration; ``published_biases`` and ``additive_biases`` are their candidates, ``splits`` their formats.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fxquant.errors import FormatError
from fxquant.formats.base import QParams
from fxquant.formats.grids import FloatGrid, power_of_two
from fxquant.formats.scaled import ScaledGrid, largest, scale_to

CANDIDATES = 100  # of the published search
Shift = Literal["none", "paper", "code"]


@dataclass(frozen=True)
class LlmFp4(ScaledGrid):
    """A grid with bias 0 (``split`` makes it); qparams: ``scale`` = 2^-b and, with pre-shifts, ``shift`` = β."""

    grid: FloatGrid
    shift: Shift = "none"

    def __post_init__(self) -> None:
        if self.grid.bias != 0 or self.grid.special != "none":
            raise FormatError(f"LLM-FP4 has grids of bias 0 in which every code is a number, not {self.grid}")

    @property
    def name(self) -> str:
        return f"llmfp{self.bits}-{self.grid.name}" + ("" if self.shift == "none" else f"-shift-{self.shift}")

    @property
    def qparam_bits(self) -> int:
        return 32 if self.shift == "none" else self.grid.exponent_bits

    def storage_bits(self, blocks: int, n: int) -> int:
        """With pre-shifts one scale a tensor, else one a block."""
        return super().storage_bits(blocks, n) + (0 if self.shift == "none" else 32)

    def fit(self, blocks: Tensor) -> QParams:
        """From the largest magnitude of every block; with pre-shifts the blocks are the channels of one tensor."""
        scale = scale_to(largest(blocks), self.grid.maximum)
        if self.shift == "none":
            return {"scale": scale}
        biases = -torch.log2(scale)
        return {"scale": scale.amax(0, keepdim=True).expand_as(scale), "shift": self.shifts(biases, biases.amin())}

    def step(self, qparams: QParams) -> Tensor:
        """``2^-(b + β)``."""
        if self.shift == "none":
            return qparams["scale"]
        return qparams["scale"] * power_of_two(-qparams["shift"].to(torch.int32))

    def shifts(self, biases: Tensor, least: Tensor) -> Tensor:
        """β of channels with biases b_c [K, 1], for the real bias ρ = ``least`` of the tensor."""
        top = (1 << self.grid.exponent_bits) - 1
        if self.shift == "paper":
            return torch.round(biases - least).clamp(0, top)
        return torch.round(biases).clamp_min(torch.round(least)).clamp_max(torch.round(least) + top) - torch.round(least)


def split(exponent_bits: int, mantissa_bits: int, shift: Shift = "none") -> LlmFp4:
    """The format EeMm."""
    return LlmFp4(FloatGrid(exponent_bits, mantissa_bits, bias=0), shift)


def bias_for(maximum: float, exponent_bits: int, mantissa_bits: int) -> float:
    """The bias with which ``maximum`` is the greatest value."""
    return 2.0**exponent_bits - math.log2(maximum) + math.log2(2 - 2.0**-mantissa_bits) - 1


def qparams_of(bias: Tensor) -> QParams:
    """The qparams of biases float32 [blocks, 1], without pre-shifts."""
    return {"scale": torch.exp2(-bias)}


def splits(bits: int) -> list[LlmFp4]:
    """The published candidates of a width: M = 0 .. bits - 2 for 4 and 6 bits, 2 .. 6 for 8."""
    if bits not in (4, 6, 8):
        raise FormatError(f"LLM-FP4 searches splits of 4, 6 and 8 bits, not {bits}")
    return [split(bits - 1 - mantissa, mantissa) for mantissa in range(2 if bits == 8 else 0, bits - 1)]


def published_biases(bias: Tensor) -> Tensor:
    """``b · (0.01 + 1.19 k / 100)``, k = 0 .. 99, along a new first axis. It multiplies a logarithm: for b near 0 all are
    alike, and for b < 0 the factors below 1 make the range smaller, not larger."""
    factors = 0.01 + 1.19 * torch.arange(CANDIDATES, dtype=torch.float32) / CANDIDATES
    return factors.view(-1, *[1] * bias.dim()) * bias


def additive_biases(bias: Tensor) -> Tensor:
    """``b + t``, t = -1, -0.95 .. 3, along a new first axis: the same ratios of the range for every b (not published)."""
    return torch.linspace(-1, 3, 81).view(-1, *[1] * bias.dim()) + bias
