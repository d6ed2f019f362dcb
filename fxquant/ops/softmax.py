"""The softmax operators over the last dimension."""

from typing import Any

import torch
from torch import Tensor

from fxquant.ops.library import define

THREE_PASS, TWO_PASS, BLOCKED = range(3)  # the forms of lowering/cpu/softmax.h


def _softmax(x: Tensor, dim: int = -1, log: bool = False) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Tensor, int, bool], output: Tensor) -> None:
    ctx.save_for_backward(output)
    ctx.log = inputs[2]


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (y,) = ctx.saved_tensors
    if ctx.log:
        return grad - y.exp() * grad.sum(-1, keepdim=True), None, None
    return y * (grad - (grad * y).sum(-1, keepdim=True)), None, None


def _softmax_into(x: Tensor, log: bool, form: int, out: Tensor) -> None:
    return None


define("softmax(Tensor x, int dim=-1, bool log=False) -> Tensor", _softmax, _gradient, _keep)
define("softmax_into(Tensor x, bool log, int form, Tensor(a!) out) -> ()", _softmax_into)
