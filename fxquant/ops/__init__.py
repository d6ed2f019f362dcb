"""The fxquant:: operators: importing this package defines all of them."""

from fxquant.ops import attention as _attention  # noqa: F401 - defines its operators
from fxquant.ops import attention_log as _attention_log  # noqa: F401 - defines its operators
from fxquant.ops import gelu as _gelu  # noqa: F401 - defines its operator
from fxquant.ops import sigmoid_attention as _sigmoid_attention  # noqa: F401 - defines its operators
from fxquant.ops.library import LIBRARY
from fxquant.ops.linear import packed_bytes
from fxquant.ops.linear_float import packed_float_bytes
from fxquant.ops.linear_lut import packed_lut_bytes
from fxquant.ops.program import FIELDS, Op
from fxquant.ops.softmax import BLOCKED, THREE_PASS, TWO_PASS
from fxquant.ops.stream import stream_bytes

__all__ = [
    "BLOCKED",
    "FIELDS",
    "LIBRARY",
    "THREE_PASS",
    "TWO_PASS",
    "Op",
    "packed_bytes",
    "packed_float_bytes",
    "packed_lut_bytes",
    "stream_bytes",
]
