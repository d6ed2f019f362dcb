"""The fxquant:: operators: importing this package defines all of them."""

from fxquant.ops import attention
from fxquant.ops.library import LIBRARY
from fxquant.ops.linear import packed_bytes

__all__ = ["LIBRARY", "attention", "packed_bytes"]
