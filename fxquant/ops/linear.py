"""The operators of low-bit linears and the fake-quant of their operands."""

from typing import Any

import torch
from torch import Tensor

from fxquant import reference
from fxquant.ops.library import LIBRARY, define


def packed_bytes(n: int, k: int, weight_bits: int, act_bits: int) -> int:
    """Bytes of a packed weight [n, k]: the Layout of lowering/cpu/layout.h."""
    panels, steps = (n + 15) // 16, (k + 3) // 4
    size = 64 + panels * (steps * 64 + 128) + _align(panels * 4)
    if weight_bits + act_bits > 15:
        return size
    shortest = 65535 // (((1 << act_bits) - 1) * ((1 << weight_bits) - 2))
    capacity = (steps + shortest - 1) // shortest
    return size + panels * 64 + _align(panels * capacity * 2) + panels * capacity * 64


def _align(size: int) -> int:
    return (size + 63) // 64 * 64


def _linear_dynamic(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, weight_bits: int, act_bits: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _linear_static(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    out_features: int,
    weight_bits: int,
    act_bits: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _linear_dynamic_int32(
    x: Tensor, packed: Tensor, out_features: int, weight_bits: int, act_bits: int, isa: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k = x.shape[-1]
    m = x.numel() // k
    return (
        x.new_empty((m, k), dtype=torch.uint8),
        x.new_empty((m,)),
        x.new_empty((m,), dtype=torch.int32),
        x.new_empty((m, out_features), dtype=torch.int32),
    )


def _pack_linear(codes: Tensor, scales: Tensor, weight_bits: int, act_bits: int) -> Tensor:
    n, k = codes.shape
    return codes.new_empty((packed_bytes(n, k, weight_bits, act_bits),), dtype=torch.uint8)


def _fake_quant(x: Tensor, bits: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_quant_static(x: Tensor, steps: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _straight_through(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad, None


def _straight_through_static(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return grad, None, None, None


define(
    "linear_dynamic(Tensor x, Tensor packed, Tensor? bias, int out_features, int weight_bits, int act_bits) -> Tensor",
    _linear_dynamic,
)
define(
    "linear_static(Tensor x, Tensor packed, Tensor? bias, Tensor scale, Tensor zero_point, int out_features,"
    " int weight_bits, int act_bits) -> Tensor",
    _linear_static,
)
define(
    "linear_dynamic_int32(Tensor x, Tensor packed, int out_features, int weight_bits, int act_bits, int isa)"
    " -> (Tensor codes, Tensor scale, Tensor zero_point, Tensor sums)",
    _linear_dynamic_int32,
)
define("pack_linear(Tensor codes, Tensor scales, int weight_bits, int act_bits) -> Tensor", _pack_linear)
define("fake_quant_per_token(Tensor x, int bits) -> Tensor", _fake_quant, _straight_through)
define("fake_quant_per_channel(Tensor w, int bits) -> Tensor", _fake_quant, _straight_through)
define(
    "fake_quant_static(Tensor x, Tensor steps, Tensor zero_point, int bits) -> Tensor",
    _fake_quant_static,
    _straight_through_static,
)
LIBRARY.impl("fake_quant_static", reference.fake_quant_static, "CompositeExplicitAutograd")
LIBRARY.impl("fake_quant_per_token", reference.fake_quant_per_token, "CompositeExplicitAutograd")
LIBRARY.impl("fake_quant_per_channel", reference.fake_quant_per_channel, "CompositeExplicitAutograd")
