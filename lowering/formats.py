"""Which packed form a scheme's weight takes: how it is rounded and packed, and the operator that multiplies by it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant import ops
from fxquant.lowering.pack import Codes, pack_codes, round_weight
from fxquant.lowering.stream import pack_stream_codes, round_weight_groups
from fxquant.schemes import Scheme

OPERATORS = ops.LIBRARY  # importing ops defines the fxquant:: operators


@dataclass(frozen=True)
class Format:
    """One packed form. The operator is called with (x, packed, bias, out_features, *arguments(scheme))."""

    round_weight: Callable[[Tensor, Scheme], Codes]
    pack: Callable[[Codes, Scheme], Tensor]
    operator: torch._ops.OpOverload
    arguments: Callable[[Scheme], tuple[int, ...]]


PANELS = Format(
    round_weight=lambda weight, scheme: round_weight(weight, scheme.weight_bits),
    pack=pack_codes,
    operator=torch.ops.fxquant.linear_dynamic.default,
    arguments=lambda scheme: (scheme.weight_bits, scheme.act_bits),
)
STREAM = Format(
    round_weight=round_weight_groups,
    pack=pack_stream_codes,
    operator=torch.ops.fxquant.linear_stream.default,
    arguments=lambda scheme: (scheme.weight_bits, scheme.act_bits, scheme.group),
)


def format_of(scheme: Scheme) -> Format:
    """The packed form of a scheme's weights."""
    return STREAM if scheme.is_streamed else PANELS
