"""Schemas, fakes and gradients of the fxquant:: operators. The integer kernels come from the library in lowering/cpu.

Importing this module builds nothing: calling an operator whose kernel is not loaded raises PyTorch's own error.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.library import Library

from fxquant import reference

_SCHEMAS = (
    "linear_dynamic(Tensor x, Tensor packed, Tensor? bias, int out_features, int weight_bits, int act_bits) -> Tensor",
    "linear_dynamic_int32(Tensor x, Tensor packed, int out_features, int weight_bits, int act_bits, int isa)"
    " -> (Tensor codes, Tensor scale, Tensor zero_point, Tensor sums)",
    "pack_linear(Tensor codes, Tensor scales, int weight_bits, int act_bits) -> Tensor",
    "fake_quant_per_token(Tensor x, int bits) -> Tensor",
    "fake_quant_per_channel(Tensor w, int bits) -> Tensor",
)

LIBRARY = Library("fxquant", "DEF")  # operators live as long as this object
for _schema in _SCHEMAS:
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

LIBRARY.impl("fake_quant_per_token", reference.fake_quant_per_token, "CompositeExplicitAutograd")
LIBRARY.impl("fake_quant_per_channel", reference.fake_quant_per_channel, "CompositeExplicitAutograd")


def packed_bytes(n: int, k: int, weight_bits: int, act_bits: int) -> int:
    """Bytes of a packed weight [n, k]: the Layout of lowering/cpu/layout.h."""
    panels, steps = (n + 15) // 16, (k + 3) // 4
    size = 64 + panels * (steps * 64 + 128) + _align(panels * 4)
    if weight_bits + act_bits > 15:
        return size
    longest = 2 if weight_bits == 8 else 4
    capacity = (steps + longest - 1) // longest
    return size + panels * 64 + _align(panels * capacity * 2) + panels * capacity * 64


def _align(size: int) -> int:
    return (size + 63) // 64 * 64


def _linear_dynamic_fake(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, weight_bits: int, act_bits: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _linear_dynamic_int32_fake(
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


def _pack_linear_fake(codes: Tensor, scales: Tensor, weight_bits: int, act_bits: int) -> Tensor:
    n, k = codes.shape
    return codes.new_empty((packed_bytes(n, k, weight_bits, act_bits),), dtype=torch.uint8)


def _fake_quant_fake(x: Tensor, bits: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


torch.library.register_fake("fxquant::linear_dynamic", _linear_dynamic_fake, lib=LIBRARY)
torch.library.register_fake("fxquant::linear_dynamic_int32", _linear_dynamic_int32_fake, lib=LIBRARY)
torch.library.register_fake("fxquant::pack_linear", _pack_linear_fake, lib=LIBRARY)
torch.library.register_fake("fxquant::fake_quant_per_token", _fake_quant_fake, lib=LIBRARY)
torch.library.register_fake("fxquant::fake_quant_per_channel", _fake_quant_fake, lib=LIBRARY)


def _no_gradient(ctx: Any, *grads: Tensor) -> NoReturn:
    raise RuntimeError(
        "fxquant::linear_dynamic has no gradient: it is an inference kernel. Run it under torch.no_grad(), "
        "or train the float model"
    )


def _straight_through(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad, None


torch.library.register_autograd("fxquant::linear_dynamic", _no_gradient, lib=LIBRARY)
torch.library.register_autograd("fxquant::linear_dynamic_int32", _no_gradient, lib=LIBRARY)
torch.library.register_autograd("fxquant::pack_linear", _no_gradient, lib=LIBRARY)
torch.library.register_autograd("fxquant::fake_quant_per_token", _straight_through, lib=LIBRARY)
torch.library.register_autograd("fxquant::fake_quant_per_channel", _straight_through, lib=LIBRARY)
