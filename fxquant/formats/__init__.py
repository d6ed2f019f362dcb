"""Number formats, one family a file: what a code is, which value it stands for, how a tensor is coded."""

from fxquant.formats.base import Format, QParams, Table
from fxquant.formats.grids import E2M1, E2M3, E3M2, E4M3, E5M2, INT8, FixedGrid, FloatGrid
from fxquant.formats.llm_fp4 import LlmFp4
from fxquant.formats.minifloat import Minifloat
from fxquant.formats.mx import Mx
from fxquant.formats.names import FLOAT_FORMATS, Coding, OperandCodings
from fxquant.formats.nf4 import FP4_BNB, NF4, NF4_DOUBLE, TableCode
from fxquant.formats.nvfp4 import Nvfp4
from fxquant.formats.uniform import Uniform

__all__ = [
    "E2M1",
    "E2M3",
    "E3M2",
    "E4M3",
    "E5M2",
    "FLOAT_FORMATS",
    "FP4_BNB",
    "INT8",
    "NF4",
    "NF4_DOUBLE",
    "Coding",
    "FixedGrid",
    "FloatGrid",
    "Format",
    "LlmFp4",
    "Minifloat",
    "Mx",
    "Nvfp4",
    "OperandCodings",
    "QParams",
    "Table",
    "TableCode",
    "Uniform",
]
