"""Packed formats of a linear's weight: which scheme is packed how, and which operator reads it.

A format is one row of ``FORMATS``. The first that takes a scheme packs its weights (``lowering/pack.py``) and names the
operator that ``passes/fuse/linear.py`` writes; nothing else in the pipeline knows one format from another.

| format | schemes | operator | what a weight becomes |
|---|---|---|---|
| panel | 4- to 8-bit weights and activations | linear_dynamic | int8, 16 columns side by side, with its accumulation schedule |
| static | the same, with static activations | linear_static | the same, of the weight times the step of each input channel |
| stream | weight-only and grouped | linear_stream | 2, 4 or 8 bits in the order in which the kernel reads them |
| lut | 2-bit weights, 2- to 6-bit activations | linear_lut | two bit planes, four k to an index of a 16-entry table |

A scheme that no row takes has no kernel: aten.linear runs on fake-quantized operands, the weight's value float32. Weights
of a 4-bit table (FP4, NF4, MXFP4, NVFP4) are streamed too (``lowering/pack_table.py``); their input is fake-quantized.

A float linear that our own kernel computes has no scheme: its operator is ``FLOAT_OPERATOR``, its weight float32 in panels
of 16 columns.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fxquant import ops
from fxquant.format_schemes import FormatScheme
from fxquant.schemes import GROUPED, GROUPS, WIDTHS, LinearScheme, Scheme


@dataclass(frozen=True)
class LinearFormat:
    """One packed format.

    ``pack(codes int8 [N, K], scale float32 [N] or [N, G], scheme)`` makes the uint8 vector of ``packed_bytes(N, K, scheme)``;
    ``operator`` is the fxquant:: name, called with (x, packed, bias, out_features, *``extra(scheme)``); a static one takes
    the steps and the zero point after the bias.
    """

    name: str
    operator: str
    takes: Callable[[Scheme], bool]
    pack: Callable[[Tensor, Tensor, Scheme], Tensor]
    packed_bytes: Callable[[int, int, Scheme], int]
    extra: Callable[[Scheme], tuple[int, ...]]

    @property
    def overload(self) -> Any:
        """The operator itself."""
        return getattr(torch.ops.fxquant, self.operator).default


def _pack_panel(codes: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    packed: Tensor = torch.ops.fxquant.pack_linear(codes, scale, scheme.weight_bits, scheme.act_bits)
    return packed


def _pack_lut(codes: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    packed: Tensor = torch.ops.fxquant.pack_lut(codes, scale, scheme.act_bits)
    return packed


def _pack_stream(codes: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    scales = scale.view(codes.shape[0], -1)
    packed: Tensor = torch.ops.fxquant.pack_stream(codes, scales, scheme.weight_bits, scheme.act_bits, scheme.group)
    return packed


def _has_panels(scheme: Scheme) -> bool:
    return scheme.weight_bits in WIDTHS and scheme.act_bits in WIDTHS and not scheme.group


_W4A8 = Scheme(4, 8)  # without groups it has panels
STREAM = LinearFormat(
    name="stream",
    operator="linear_stream",
    takes=lambda scheme: str(replace(scheme, group=0)) in GROUPED and scheme.group in (0, *GROUPS) and scheme != _W4A8,
    pack=_pack_stream,
    packed_bytes=lambda n, k, scheme: ops.stream_bytes(n, k, scheme.weight_bits, scheme.act_bits, scheme.group),
    extra=lambda scheme: (scheme.weight_bits, scheme.act_bits, scheme.group),
)
LUT = LinearFormat(
    name="lut",
    operator="linear_lut",
    takes=lambda scheme: scheme.weight_bits == 2 and 2 <= scheme.act_bits <= 6 and not scheme.group and not scheme.static,
    pack=_pack_lut,
    packed_bytes=lambda n, k, scheme: ops.packed_lut_bytes(n, k),
    extra=lambda scheme: (scheme.act_bits,),
)
STATIC = LinearFormat(
    name="static",
    operator="linear_static",
    takes=lambda scheme: scheme.static and _has_panels(scheme),
    pack=_pack_panel,
    packed_bytes=lambda n, k, scheme: ops.packed_bytes(n, k, scheme.weight_bits, scheme.act_bits),
    extra=lambda scheme: (scheme.weight_bits, scheme.act_bits),
)
PANEL = LinearFormat(
    name="panel",
    operator="linear_dynamic",
    takes=_has_panels,
    pack=_pack_panel,
    packed_bytes=lambda n, k, scheme: ops.packed_bytes(n, k, scheme.weight_bits, scheme.act_bits),
    extra=lambda scheme: (scheme.weight_bits, scheme.act_bits),
)
FLOAT_OPERATOR = "linear_float"
FORMATS = (STATIC, STREAM, LUT, PANEL)


def format_of(scheme: LinearScheme) -> LinearFormat | None:
    """The first format that takes a scheme; None where no kernel has it."""
    if isinstance(scheme, FormatScheme) or scheme.coding is not None:
        return None
    return next((form for form in FORMATS if form.takes(scheme)), None)


def operator_of(scheme: LinearScheme) -> str | None:
    """The fxquant:: operator that multiplies a scheme's weight; None where its specification runs in float."""
    if isinstance(scheme, FormatScheme):
        return None if scheme.table_group is None else STREAM.operator
    form = format_of(scheme)
    return None if form is None else form.operator
