"""Sigmoid attention, forward and backward. The backward pass computes the weights again from q, k and v."""

from typing import Any

import torch
from torch import Tensor

from fxquant.ops.library import define

Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, float, float, bool]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, slopes: Tensor | None, scale: float, bias: float, causal: bool
) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: Inputs, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.settings = inputs[5:]


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if any(ctx.needs_input_grad[3:5]):
        raise RuntimeError(
            "fxquant::sigmoid_attention has no gradient of its mask or slopes; detach them, or write the attention out"
        )
    op = torch.ops.fxquant.sigmoid_attention_backward
    gradients: tuple[Tensor, Tensor, Tensor] = op(grad, *ctx.saved_tensors, *ctx.settings)
    return *gradients, None, None, None, None, None


_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? slopes, float scale, float bias, bool causal"
define(f"sigmoid_attention({_ARGUMENTS}) -> Tensor", _forward, _gradient, _keep)
define(f"sigmoid_attention_backward(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", _backward)
