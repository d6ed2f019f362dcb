"""The fxquant:: operators: importing this package defines all of them."""

from fxquant.ops.library import LIBRARY
from fxquant.ops.linear import packed_bytes
from fxquant.ops.program import FIELDS, Op

__all__ = ["FIELDS", "LIBRARY", "Op", "packed_bytes"]
