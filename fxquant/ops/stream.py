"""The operators of streamed linears (decode kernels) and the fake-quant of grouped weights."""

from typing import Any

import torch
from torch import Tensor

from fxquant import reference
from fxquant.ops.library import LIBRARY, define

TABLE_BYTES = 64  # 16 values, float32


def stream_bytes(n: int, k: int, weight_bits: int, act_bits: int, group: int) -> int:
    """Bytes of a streamed weight [n, k] without a table: the StreamLayout of lowering/cpu/stream_layout.h."""
    panels, step_k = -(-n // 16), 32 // weight_bits
    groups = -(-k // group) if group else 1
    tail = 64 + (0 if act_bits == 16 else 32 if group else 64)
    return 64 + panels * (-(-k // step_k) * 64 + groups * tail)


def _linear_stream(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, weight_bits: int, act_bits: int, group: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _pack_stream(codes: Tensor, scales: Tensor, weight_bits: int, act_bits: int, group: int) -> Tensor:
    n, k = codes.shape
    return codes.new_empty((stream_bytes(n, k, weight_bits, act_bits, group),), dtype=torch.uint8)


def _pack_stream_table(codes: Tensor, values: Tensor, scales: Tensor, group: int) -> Tensor:
    n, k = codes.shape
    return codes.new_empty((stream_bytes(n, k, 4, 16, group) + TABLE_BYTES,), dtype=torch.uint8)


def _contents_unknown(*args: Any) -> Any:
    raise NotImplementedError("the shape of this result stands inside the packed weight: it cannot be traced")


def _fake_quant(weight: Tensor, bits: int, group: int) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _straight_through(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return grad, None, None


define(
    "linear_stream(Tensor x, Tensor packed, Tensor? bias, int out_features, int weight_bits, int act_bits, int group)"
    " -> Tensor",
    _linear_stream,
)
define("pack_stream(Tensor codes, Tensor scales, int weight_bits, int act_bits, int group) -> Tensor", _pack_stream)
define("pack_stream_table(Tensor codes, Tensor values, Tensor scales, int group) -> Tensor", _pack_stream_table)
define("unpack_stream(Tensor packed) -> (Tensor codes, Tensor scales)", _contents_unknown)
define("stream_sums(Tensor x, Tensor packed) -> Tensor", _contents_unknown)
define("fake_quant_per_group(Tensor w, int bits, int group) -> Tensor", _fake_quant, _straight_through)
LIBRARY.impl("fake_quant_per_group", reference.fake_quant_per_group, "CompositeExplicitAutograd")
