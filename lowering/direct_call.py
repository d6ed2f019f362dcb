"""Calls of library functions that Inductor puts into its code as they are: pointers and numbers, no dispatcher.

The C++ around a call does not depend on sizes or strides, which are arguments: all calls of one function share one compiled
kernel, on a machine and in its compile cache.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fxquant._compat import Inductor
from fxquant.lowering.linear_template import declarations

MASK_NONE, MASK_BOOL, MASK_FLOAT = range(3)  # FXQUANT_MASK_* of attention.h
_NUMBERS = 22  # that fxquant_attention_call reads


@dataclass(frozen=True)
class DirectCall:
    """``function(pointers..., numbers, scale)`` of the library; a pointer type of None stands for nullptr."""

    function: str
    pointers: tuple[str | None, ...]
    numbers: int

    def arg_types(self) -> list[str]:
        """The C types of the kernel's arguments: the pointers given, an offset of each, the numbers, the scale."""
        given = [kind for kind in self.pointers if kind is not None]
        return [*given, *["const int64_t"] * (len(given) + self.numbers), "const float"]

    def source(self, kernel_name: str, export: str, profile: tuple[str, str]) -> str:
        """The C++ kernel; ``profile`` is the header and the line that make it appear in profiles."""
        given = [i for i, kind in enumerate(self.pointers) if kind is not None]
        pointers = ", ".join(f"p{i} + o{i}" if i in given else "nullptr" for i in range(len(self.pointers)))
        names = [*(f"p{i}" for i in given), *(f"o{i}" for i in given), *(f"n{i}" for i in range(self.numbers)), "scale"]
        arguments = ", ".join(f"{kind} {name}" for kind, name in zip(self.arg_types(), names, strict=True))
        numbers = ", ".join(f"n{i}" for i in range(self.numbers))
        header, line = profile
        return f"""{header}#include <cstdint>
#include <stdexcept>
{declarations((self.function,))}
extern "C" {export} void {kernel_name}({arguments})
{{
    {line}
    const int64_t numbers[] = {{{numbers}}};
    {self.function}({pointers}, numbers, scale);
}}
"""


def attention_lowering(inductor: Inductor) -> Callable[..., Any]:
    """fxquant::attention as a direct call, where every size is known to fit; the operator checks the others."""
    op = torch.ops.fxquant.attention.default

    def lower(q: Any, k: Any, v: Any, mask: Any, is_causal: bool, scale: float | None) -> Any:
        if not _fits(inductor, q, k, v, mask, scale):
            return inductor.fallback_handler(op)(q, k, v, mask, is_causal, scale)
        wide = len(q.get_size()) == 4
        batch, heads, queries, depth = _four(q.get_size())
        _, kv_heads, keys, value_depth = _four(v.get_size())
        operands = [inductor.realize_dense_rows(x) for x in (q, k, v)]
        kind, given = _mask_of(inductor, mask)
        mask_strides = _mask_strides(inductor, given[0], wide) if given else [0] * 4
        numbers = [batch, heads, kv_heads, queries, keys, depth, value_depth]
        numbers += [stride for x in operands for stride in _four_strides(x.get_stride())]
        numbers += [*mask_strides, kind, int(is_causal)]
        factor = 1.0 / math.sqrt(int(depth)) if scale is None else float(scale)
        pointer = {MASK_NONE: None, MASK_BOOL: "const bool*", MASK_FLOAT: "const float*"}[kind]
        call = DirectCall("fxquant_attention_call", (*["const float*"] * 3, pointer, "float*"), _NUMBERS)
        layout = inductor.fixed_layout(q.get_device(), torch.float32, [batch, queries, heads, value_depth])
        made = inductor.direct_call(call, layout, [*operands, *given], numbers, [factor])
        return inductor.permute(made, [0, 2, 1, 3]) if wide else inductor.view(made, [batch, queries, value_depth])

    return lower


def _fits(inductor: Inductor, q: Any, k: Any, v: Any, mask: Any, scale: float | None) -> bool:
    """Whether everything that the operator would check at run time is certain already."""
    sizes = [x.get_size() for x in (q, k, v)]
    dims = len(sizes[0])
    if any(x.get_device().type != "cpu" or x.get_dtype() != torch.float32 for x in (q, k, v)):
        return False
    if dims not in (3, 4) or any(len(size) != dims for size in sizes):
        return False
    (batch, heads, queries, depth), (k_batch, k_heads, keys, k_depth), (v_batch, v_heads, values, v_depth) = map(_four, sizes)
    pairs = [(batch, k_batch), (batch, v_batch), (depth, k_depth), (keys, values), (k_heads, v_heads)]
    known = all(inductor.is_equal(a, b) for a, b in pairs) and all(x.is_number for x in (heads, k_heads, depth, v_depth))
    if not known or int(k_heads) < 1 or int(heads) % int(k_heads) or min(int(depth), int(v_depth)) < 1:
        return False
    if not inductor.is_positive(keys) or not (scale is None or isinstance(scale, (int, float))):
        return False
    return mask is None or _mask_fits(inductor, mask, [batch, heads, queries, keys], dims == 4)


def _mask_fits(inductor: Inductor, mask: Any, sizes: list[Any], wide: bool) -> bool:
    size = mask.get_size()
    if mask.get_dtype() not in (torch.bool, torch.float32) or len(size) > (4 if wide else 3):
        return False
    wanted = [sizes[axis] for axis in _mask_axes(len(size), wide)]
    return all(inductor.is_equal(a, 1) or inductor.is_equal(a, b) for a, b in zip(size, wanted, strict=True))


def _mask_axes(dims: int, wide: bool) -> list[int]:
    """Which of batch, head, query and key each dimension of a mask is."""
    axes = list(range(4 - dims, 4))
    return [0, *axes[1:]] if not wide and dims == 3 else axes


def _mask_of(inductor: Inductor, mask: Any) -> tuple[int, list[Any]]:
    """The kind of a mask, and the mask in memory: computed once, however many layers read it."""
    if mask is None:
        return MASK_NONE, []
    kind = MASK_BOOL if mask.get_dtype() == torch.bool else MASK_FLOAT
    return kind, [inductor.realize(mask)]


def _mask_strides(inductor: Inductor, mask: Any, wide: bool) -> list[Any]:
    strides: list[Any] = [0] * 4
    sizes = mask.get_size()
    for axis, size, stride in zip(_mask_axes(len(sizes), wide), sizes, mask.get_stride(), strict=True):
        strides[axis] = 0 if inductor.is_equal(size, 1) else stride
    return strides


def _four(size: Any) -> list[Any]:
    """Batch, heads, rows and columns; a tensor of three dimensions has one head."""
    import sympy

    given = [sympy.sympify(s) for s in size]
    return given if len(given) == 4 else [given[0], sympy.Integer(1), *given[1:]]


def _four_strides(strides: Any) -> list[Any]:
    """Batch, head and row stride."""
    given = list(strides)
    return given[:3] if len(given) == 4 else [given[0], 0, given[1]]
