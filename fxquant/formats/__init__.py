"""Number formats, one family a file: what a code is, which value it stands for, how a tensor is coded."""

from fxquant.formats.adalog import AdaLog
from fxquant.formats.base import Format, QParams, Table
from fxquant.formats.binary import SignBinary, SoftmaxBinary
from fxquant.formats.log2 import Log2
from fxquant.formats.log_codes import ZeroPolicy
from fxquant.formats.log_sqrt2 import LogSqrt2
from fxquant.formats.sulq import Sulq
from fxquant.formats.tanq import TanQ
from fxquant.formats.twin_uniform import TwinGelu, TwinSoftmax
from fxquant.formats.uniform import Uniform

_ALL = (AdaLog, Log2, LogSqrt2, SignBinary, SoftmaxBinary, Sulq, TanQ, TwinGelu, TwinSoftmax, Uniform)
FAMILIES: dict[str, type[Format]] = {family.__name__: family for family in _ALL}  # by the name that files carry

__all__ = [
    "FAMILIES",
    "AdaLog",
    "Format",
    "Log2",
    "LogSqrt2",
    "QParams",
    "SignBinary",
    "SoftmaxBinary",
    "Sulq",
    "Table",
    "TanQ",
    "TwinGelu",
    "TwinSoftmax",
    "Uniform",
    "ZeroPolicy",
]
