"""The fxquant:: operators inside Inductor. Only this file registers with Inductor.

Linears become a template around the library's tile kernels (``linear_template.py``), attention and chains of row-wise work
calls of the library (``direct_call.py``, ``rows_call.py``), GELU pointwise work that vanishes into its neighbours.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch

from fxquant._compat import Inductor
from fxquant.lowering.direct_call import attention_lowering
from fxquant.lowering.linear_template import (
    LinearShell,
    float_shell,
    lut_shell,
    panel_shell,
    stream_shell,
    template_class,
)
from fxquant.lowering.rows_call import rows_lowering
from fxquant.reference.rows import ERF as GELU_ERF
from fxquant.reference.rows import GELU_END
from fxquant.reference.rows import TANH as GELU_TANH

# Operator → how the template is filled for it, from K and what follows out_features in its schema.
_LINEARS: dict[str, Callable[..., LinearShell]] = {
    "linear_dynamic": functools.partial(panel_shell, static=False),
    "linear_static": functools.partial(panel_shell, static=True),
    "linear_lut": lut_shell,
    "linear_stream": stream_shell,
    "linear_float": float_shell,
}


@functools.cache
def register() -> None:
    """Teach Inductor the fxquant:: operators. Idempotent: a lowering table entry can be set once only."""
    inductor = Inductor.load()
    template = template_class(inductor)
    for name, shell in _LINEARS.items():
        op = getattr(torch.ops.fxquant, name).default
        inductor.register_lowering(op, type_promotion_kind=None)(_linear(inductor, op, template, shell))
    inductor.register_lowering(torch.ops.fxquant.gelu.default, type_promotion_kind=None)(_gelu(inductor))
    inductor.register_lowering(torch.ops.fxquant.attention.default, type_promotion_kind=None)(attention_lowering(inductor))
    inductor.register_lowering(torch.ops.fxquant.rows.default, type_promotion_kind=None)(rows_lowering(inductor))


def _linear(inductor: Inductor, op: Any, template: Any, shell: Callable[..., LinearShell]) -> Callable[..., Any]:
    """The lowering of one linear; ``rest`` are the steps and zero point of a static one, out_features, and its numbers."""

    def lower(x: Any, packed: Any, bias: Any, *rest: Any) -> Any:
        static = [value for value in rest if not isinstance(value, int)]
        out_features, *numbers = rest[len(static) :]
        *lead, k = x.get_size()
        is_spread = not static or static[0].get_size() == [k]  # the operator spreads one step over all channels
        if x.get_device().type != "cpu" or not is_spread or not sympy.sympify(k).is_number:
            return inductor.fallback_handler(op)(x, packed, bias, *rest)
        m = sympy.Mul(*lead)
        inputs = {"X": inductor.realize_contiguous(inductor.view(x, [m, k])), "W": inductor.realize(packed)}
        inputs |= {name: inductor.realize_contiguous(value) for name, value in zip("SZ", static, strict=False)}
        if bias is not None:
            inputs["B"] = inductor.realize_contiguous(bias)
        layout = inductor.fixed_layout(x.get_device(), torch.float32, [m, sympy.Integer(out_features)])
        made = template(inputs, layout, shell(int(k), *numbers))
        return inductor.view(inductor.template_output(made), [*lead, out_features])

    return lower


def _gelu(inductor: Inductor) -> Callable[..., Any]:
    """The lowering of GELU: reference.rows.gelu, operation for operation."""
    ops = inductor.ops

    def number(value: float) -> Any:
        return ops.constant(value, torch.float32)

    def value(x: Any, coefficients: Sequence[float]) -> Any:
        a = ops.minimum(ops.abs(x), number(GELU_END))
        p = number(coefficients[-1])
        for c in reversed(coefficients[:-1]):
            p = ops.add(ops.mul(p, a), number(c))
        for _ in range(3):
            p = ops.mul(p, p)
        return ops.sub(ops.maximum(x, number(0.0)), ops.mul(a, p))

    def lower(x: Any, tanh: bool) -> Any:
        load = x.make_loader()
        return inductor.pointwise(x, lambda index: value(load(index), GELU_TANH if tanh else GELU_ERF))

    return lower
