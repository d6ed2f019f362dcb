"""From a float weight to the streamed form of 4-bit codes that stand for the values of a table (FP4, NF4, MXFP4, NVFP4)."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fxquant.coding import Coding
from fxquant.errors import PackError
from fxquant.format_schemes import TABLE_BITS
from fxquant.formats import QParams
from fxquant.granularity import PerChannel, PerGroup
from fxquant.lowering.pack import check_weight


@runtime_checkable
class TableFormat(Protocol):
    """A format whose values are those of a fixed table times a step of the block."""

    @property
    def unit_values(self) -> Tensor:
        """The table, float32 [codes]."""

    def step(self, qparams: QParams) -> Tensor:
        """Float32 [blocks, 1]."""


@dataclass(frozen=True)
class TableCodes:
    """codes int8 [N, K], 0 .. 15, of values float32 [16], times scale float32 [N, G]; ``group`` input features share one,
    0: all of an output channel."""

    codes: Tensor
    values: Tensor
    scale: Tensor
    group: int

    def pack(self) -> Tensor:
        """The uint8 vector that ``linear_stream`` reads as 4-bit weights with 16-bit activations."""
        packed: Tensor = torch.ops.fxquant.pack_stream_table(self.codes, self.values, self.scale, self.group)
        return packed


def round_to_table(weight: Tensor, coding: Coding) -> TableCodes:
    """The codes of a float weight [N, K].

    Raises:
        PackError: the weight cannot be packed, or no kernel reads this coding.
    """
    form = coding.format
    if form.bits != TABLE_BITS or not isinstance(form, TableFormat):
        raise PackError(f"{form.name} has no kernel: weights of a table have {TABLE_BITS}-bit codes with one step a block")
    if not isinstance(coding.granularity, PerGroup) and coding.granularity != PerChannel(0):
        raise PackError(f"{form.name} {coding.granularity}: a weight's scales go with a group of input features or a channel")
    check_weight(weight)
    blocks = coding.granularity.blocks(weight.detach().to(torch.float32))
    qparams = form.fit(blocks)
    codes = coding.granularity.restore(form.quantize(blocks, qparams), weight).to(torch.int8)
    group = coding.granularity.size if isinstance(coding.granularity, PerGroup) else 0
    return TableCodes(codes, form.unit_values, form.step(qparams).reshape(weight.shape[0], -1), group)
