"""The float and block formats by the names that options use, with what each operand of a linear becomes.

| name | weight | activation, dynamic |
|---|---|---|
| fp8, fp8-e5m2 | E4M3 or E5M2, float32 scale an output channel | the same, float32 scale a token |
| fp6-e2m3, fp6-e3m2 | E2M3 or E3M2, float32 scale an output channel | the same, float32 scale a token |
| fp4 | E2M1, float32 scale for 64 input features | the same |
| fp4-bnb | bitsandbytes' FP4, float32 scale for 64 input features | float |
| nf4 | NF4, double quantized scale for 64 input features | float |
| mxfp8-e4m3, mxfp8-e5m2, mxfp6-e2m3, mxfp6-e3m2, mxfp4, mxint8 | MX, power of two (rceil) for 32 input features | the same |
| nvfp4 | E2M1, E4M3 scale for 16 input features, float32 scale a tensor | the same |

The groups are along the last axis of weight [N, K] and activation [..., K]; a short last group of a row is filled up with
zeros. nvfp4's dynamic tensor scale makes a token's codes depend on the other tokens of the call.
"""

from dataclasses import dataclass

from torch import Tensor

from fxquant.formats.base import Format
from fxquant.formats.grids import E2M1, E2M3, E3M2, E4M3, E5M2, INT8
from fxquant.formats.minifloat import Minifloat
from fxquant.formats.mx import MX_BLOCK, Mx
from fxquant.formats.nf4 import BNB_BLOCK, FP4_BNB, NF4_DOUBLE
from fxquant.formats.nvfp4 import NVFP4_BLOCK, Nvfp4
from fxquant.granularity import Granularity, PerChannel, PerGroup, PerToken

FP4_GROUP = 64


@dataclass(frozen=True)
class Coding:
    """A format and which values share its qparams."""

    format: Format
    granularity: Granularity

    def fake_quant(self, x: Tensor) -> Tensor:
        """x fitted, quantized and dequantized, in its shape and dtype."""
        blocks = self.granularity.blocks(x)
        return self.granularity.restore(self.format.fake_quant(blocks, self.format.fit(blocks.detach())), x)

    def bits_per_value(self, x: Tensor) -> float:
        """Bits of storage a value of x, with qparams and the filling of short groups."""
        return self.format.storage_bits(*self.granularity.blocks(x).shape) / x.numel()


@dataclass(frozen=True)
class OperandCodings:
    """How a linear's weight and activation are coded; an activation of None stays float."""

    weight: Coding
    activation: Coding | None


def _rows(form: Format) -> OperandCodings:
    return OperandCodings(Coding(form, PerChannel(0)), Coding(form, PerToken()))


def _groups(form: Format, size: int, weight_only: bool = False) -> OperandCodings:
    coding = Coding(form, PerGroup(size))
    return OperandCodings(coding, None if weight_only else coding)


FLOAT_FORMATS = {
    "fp8": _rows(Minifloat(E4M3)),
    "fp8-e5m2": _rows(Minifloat(E5M2)),
    "fp6-e2m3": _rows(Minifloat(E2M3)),
    "fp6-e3m2": _rows(Minifloat(E3M2)),
    "fp4": _groups(Minifloat(E2M1), FP4_GROUP),
    "fp4-bnb": _groups(FP4_BNB, BNB_BLOCK, weight_only=True),
    "nf4": _groups(NF4_DOUBLE, BNB_BLOCK, weight_only=True),
    "mxfp8-e4m3": _groups(Mx(E4M3), MX_BLOCK),
    "mxfp8-e5m2": _groups(Mx(E5M2), MX_BLOCK),
    "mxfp6-e2m3": _groups(Mx(E2M3), MX_BLOCK),
    "mxfp6-e3m2": _groups(Mx(E3M2), MX_BLOCK),
    "mxfp4": _groups(Mx(E2M1), MX_BLOCK),
    "mxint8": _groups(Mx(INT8), MX_BLOCK),
    "nvfp4": _groups(Nvfp4(), NVFP4_BLOCK),
}
