"""The namespace of the fxquant:: operators. Each file beside this one defines the operators of one kind of kernel.

Importing them builds nothing: calling an operator whose kernel is not loaded raises PyTorch's own error.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.library import Library

LIBRARY = Library("fxquant", "DEF")  # operators live as long as this object


def define(
    schema: str,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    is_hot: bool = False,
) -> None:
    """Define one operator: its schema, its shapes on fake tensors, and its gradient (None: an error that says so).

    ``setup_context`` keeps what the gradient needs. An operator that writes to an argument has no gradient, nor has a hot one,
    that compiled graphs call with gradients off: the layer that raises costs 5 us a call, and PyTorch then only warns.
    """
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = f"fxquant::{schema.partition('(')[0]}"
    torch.library.register_fake(name, fake, lib=LIBRARY)
    if "!" not in schema and not is_hot:
        torch.library.register_autograd(name, backward or _no_gradient(name), setup_context=setup_context, lib=LIBRARY)


def _no_gradient(name: str) -> Callable[..., NoReturn]:
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(
            f"{name} has no gradient: it is an inference kernel. Run it under torch.no_grad(), or train the float model"
        )

    return backward
