"""The operators of float linears on weights packed in panels. Meaning: ``torch.nn.functional.linear``, error class REAL."""

import torch
from torch import Tensor

from fxquant.ops.library import define


def packed_float_bytes(n: int, k: int) -> int:
    """Bytes of a packed float weight [n, k]: float_packed_bytes of lowering/cpu/linear_float_layout.h."""
    return 64 + (n + 15) // 16 * k * 64


def _linear_float(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _pack_float(weight: Tensor) -> Tensor:
    return weight.new_empty((packed_float_bytes(*weight.shape),), dtype=torch.uint8)


define(
    "linear_float(Tensor x, Tensor packed, Tensor? bias, int out_features) -> Tensor",
    _linear_float,
    is_hot=True,
)
define("pack_float(Tensor weight) -> Tensor", _pack_float)
