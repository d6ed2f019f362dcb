"""The operators of linears with 2-bit weights, computed by table look-up."""

import torch
from torch import Tensor

from fxquant.ops.library import define


def packed_lut_bytes(n: int, k: int) -> int:
    """Bytes of a packed 2-bit weight [n, k]: the LutLayout of lowering/cpu/lut_layout.h."""
    panels, steps = (n + 15) // 16, (k + 15) // 16
    return 64 + panels * (steps * 64 + 128)


def _linear_lut(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, act_bits: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _linear_lut_int32(x: Tensor, packed: Tensor, out_features: int, act_bits: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features), dtype=torch.int32)


def _pack_lut(codes: Tensor, scales: Tensor, act_bits: int) -> Tensor:
    return codes.new_empty((packed_lut_bytes(*codes.shape),), dtype=torch.uint8)


define("linear_lut(Tensor x, Tensor packed, Tensor? bias, int out_features, int act_bits) -> Tensor", _linear_lut)
define("linear_lut_int32(Tensor x, Tensor packed, int out_features, int act_bits) -> Tensor", _linear_lut_int32)
define("pack_lut(Tensor codes, Tensor scales, int act_bits) -> Tensor", _pack_lut)
