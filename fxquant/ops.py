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


def _linear_dynamic_fake(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, weight_bits: int, act_bits: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _fake_quant_fake(x: Tensor, bits: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


torch.library.register_fake("fxquant::linear_dynamic", _linear_dynamic_fake, lib=LIBRARY)
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
torch.library.register_autograd("fxquant::fake_quant_per_token", _straight_through, lib=LIBRARY)
torch.library.register_autograd("fxquant::fake_quant_per_channel", _straight_through, lib=LIBRARY)
