"""Number formats, one family a file: what a code is, which value it stands for, how a tensor is coded."""

from fxquant.formats.adalog import AdaLog
from fxquant.formats.base import Format, QParams, Table
from fxquant.formats.binary import SignBinary, SoftmaxBinary
from fxquant.formats.grids import E2M1, E2M3, E3M2, E4M3, E5M2, INT8, FixedGrid, FloatGrid
from fxquant.formats.llm_fp4 import LlmFp4
from fxquant.formats.log2 import Log2
from fxquant.formats.log_codes import ZeroPolicy
from fxquant.formats.log_sqrt2 import LogSqrt2
from fxquant.formats.minifloat import Minifloat
from fxquant.formats.mx import Mx
from fxquant.formats.nf4 import FP4_BNB, NF4, NF4_DOUBLE, TableCode
from fxquant.formats.nvfp4 import Nvfp4
from fxquant.formats.sulq import Sulq
from fxquant.formats.tanq import TanQ
from fxquant.formats.twin_uniform import TwinGelu, TwinSoftmax
from fxquant.formats.uniform import Uniform

_LOGARITHMIC: tuple[type[Format], ...] = (AdaLog, Log2, LogSqrt2, Sulq, TanQ)
_FLOATING: tuple[type[Format], ...] = (LlmFp4, Minifloat, Mx, Nvfp4, TableCode)
_OTHERS: tuple[type[Format], ...] = (SignBinary, SoftmaxBinary, TwinGelu, TwinSoftmax, Uniform)
# By the name that files carry.
FAMILIES: dict[str, type[Format]] = {family.__name__: family for family in (*_LOGARITHMIC, *_FLOATING, *_OTHERS)}
PARTS: dict[str, type] = {part.__name__: part for part in (FixedGrid, FloatGrid)}  # dataclasses that formats have as fields

__all__ = [
    "E2M1",
    "E2M3",
    "E3M2",
    "E4M3",
    "E5M2",
    "FAMILIES",
    "FP4_BNB",
    "INT8",
    "NF4",
    "NF4_DOUBLE",
    "PARTS",
    "AdaLog",
    "FixedGrid",
    "FloatGrid",
    "Format",
    "LlmFp4",
    "Log2",
    "LogSqrt2",
    "Minifloat",
    "Mx",
    "Nvfp4",
    "QParams",
    "SignBinary",
    "SoftmaxBinary",
    "Sulq",
    "Table",
    "TableCode",
    "TanQ",
    "TwinGelu",
    "TwinSoftmax",
    "Uniform",
    "ZeroPolicy",
]
