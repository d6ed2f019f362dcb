"""OCP Microscaling: blocks of 32 values, one power of two (E8M0) a block: MXFP8, MXFP6, MXFP4 and MXINT8.

With ``max|x| = m · 2^e``, 1 ≤ m < 2, a grid whose greatest value is ``M · 2^E``, 1 ≤ M < 2, and b mantissa bits, the scale is
``2^(e - E + 1)`` where the rule says so and ``2^(e - E)`` elsewhere:

| rule | rounds the scale up where | source |
|---|---|---|
| floor | never; values above the maximum saturate | the text of OCP MX 1.0 |
| ceil | m > 1 | torchao |
| even | m ≥ 2 - 2^-(b+1): max|x| rounded to the grid's mantissa carries into the next exponent | torchao |
| rceil | m > M: nothing saturates | torchao, cuBLAS |

The exponents are read from the bits, never from a logarithm, and kept in -127 .. 127; a block of zeros takes 2^-127 and codes
0. Blocks are finite: the scale's NaN code is never made. linear-layers section 12, confirmed; ``even`` and ``rceil`` for INT8
follow the same formulas, which no source states (unconfirmed).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fxquant.formats.base import QParams
from fxquant.formats.grids import EXPONENT_BIAS, FixedGrid, FloatGrid, power_of_two
from fxquant.formats.scaled import ScaledGrid, largest

MX_BLOCK = 32
ScaleRule = Literal["floor", "ceil", "even", "rceil"]


@dataclass(frozen=True)
class Mx(ScaledGrid):
    """A grid times ``scale``, a power of two."""

    grid: FloatGrid | FixedGrid
    rule: ScaleRule = "rceil"

    @property
    def name(self) -> str:
        kind = "mxint8" if isinstance(self.grid, FixedGrid) else f"mxfp{self.bits}-{self.grid.name}"
        return kind + ("" if self.rule == "rceil" else f"-{self.rule}")

    @property
    def block_size(self) -> int:
        return MX_BLOCK

    @property
    def qparam_bits(self) -> int:
        return 8

    def fit(self, blocks: Tensor) -> QParams:
        """The power of two that the rule gives for the largest magnitude of a block."""
        mantissa, exponent = torch.frexp(largest(blocks))  # a mantissa in 0.5 .. 1, or 0
        of_maximum, exponent_of_maximum = math.frexp(self.grid.maximum)
        up = {
            "floor": torch.zeros_like(mantissa, dtype=torch.bool),
            "ceil": mantissa > 0.5,
            "even": mantissa >= 1 - 2.0 ** -(self.grid.mantissa_bits + 2),
            "rceil": mantissa > of_maximum,
        }[self.rule]
        shift = (exponent - exponent_of_maximum + up.to(torch.int32)).clamp(-EXPONENT_BIAS, EXPONENT_BIAS)
        return {"scale": power_of_two(torch.where(mantissa == 0, -EXPONENT_BIAS, shift))}

    def step(self, qparams: QParams) -> Tensor:
        return qparams["scale"]
