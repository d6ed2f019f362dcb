"""Schemes of linears by number formats, by the names that options use.

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

from fxquant.coding import Coding
from fxquant.formats import E2M1, E2M3, E3M2, E4M3, E5M2, FP4_BNB, INT8, NF4_DOUBLE, Format, Minifloat, Mx, Nvfp4
from fxquant.formats.mx import MX_BLOCK
from fxquant.formats.nf4 import BNB_BLOCK
from fxquant.formats.nvfp4 import NVFP4_BLOCK
from fxquant.granularity import PerChannel, PerGroup, PerToken

FP4_GROUP = 64
TABLE_BITS = 4  # of codes that the decode kernel looks up


@dataclass(frozen=True)
class FormatScheme:
    """A linear whose operands are coded in number formats; ``activation`` None leaves the input float."""

    name: str
    weight: Coding
    activation: Coding | None
    static: bool = False

    def __str__(self) -> str:
        return f"{self.name} static" if self.static else self.name

    @property
    def is_weight_only(self) -> bool:
        return self.activation is None

    @property
    def table_group(self) -> int | None:
        """Input features that share a scale, where the kernel of streamed 4-bit tables reads the weight; else None."""
        granularity = self.weight.granularity
        is_table = self.weight.format.bits == TABLE_BITS and isinstance(granularity, PerGroup)
        return granularity.size if is_table and isinstance(granularity, PerGroup) else None


def _rows(name: str, form: Format) -> FormatScheme:
    return FormatScheme(name, Coding(form, PerChannel(0)), Coding(form, PerToken()))


def _groups(name: str, form: Format, size: int, is_weight_only: bool = False) -> FormatScheme:
    coding = Coding(form, PerGroup(size))
    return FormatScheme(name, coding, None if is_weight_only else coding)


_SCHEMES = (
    _rows("fp8", Minifloat(E4M3)),
    _rows("fp8-e5m2", Minifloat(E5M2)),
    _rows("fp6-e2m3", Minifloat(E2M3)),
    _rows("fp6-e3m2", Minifloat(E3M2)),
    _groups("fp4", Minifloat(E2M1), FP4_GROUP),
    _groups("fp4-bnb", FP4_BNB, BNB_BLOCK, is_weight_only=True),
    _groups("nf4", NF4_DOUBLE, BNB_BLOCK, is_weight_only=True),
    _groups("mxfp8-e4m3", Mx(E4M3), MX_BLOCK),
    _groups("mxfp8-e5m2", Mx(E5M2), MX_BLOCK),
    _groups("mxfp6-e2m3", Mx(E2M3), MX_BLOCK),
    _groups("mxfp6-e3m2", Mx(E3M2), MX_BLOCK),
    _groups("mxfp4", Mx(E2M1), MX_BLOCK),
    _groups("mxint8", Mx(INT8), MX_BLOCK),
    _groups("nvfp4", Nvfp4(), NVFP4_BLOCK),
)
FORMAT_SCHEMES = {scheme.name: scheme for scheme in _SCHEMES}
