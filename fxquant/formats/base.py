"""What every number format offers: fit, quantize, dequantize, fake_quant, levels and the threshold + table form.

A format is a frozen dataclass: its fields are what is fixed (bits, table, zero policy); what is found from data is a mapping
of named float32 tensors, its qparams. ``quantize`` and ``dequantize`` work on any tensor that the qparams broadcast to; with
a granularity (``fxquant.granularity``) that is x as [blocks, n] and qparams [blocks, 1].

Codes are integers 0 .. number of levels - 1 in the order in which hardware would store them, which need not be the order of
the values. Half-precision inputs are coded as float32. NaN stays NaN in ``fake_quant``; ±inf saturates.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import FormatError

QParams = Mapping[str, Tensor]


@dataclass(frozen=True)
class Table:
    """The threshold + table form of a format with the qparams of one block.

    ``thresholds`` float32 [L - 1], ascending: the rank of x is the number of thresholds ≤ x. ``values`` float32 [L] and
    ``codes`` int64 [L]: what a rank stands for.
    """

    thresholds: Tensor
    values: Tensor
    codes: Tensor

    def rank(self, x: Tensor) -> Tensor:
        """int64, shaped like x."""
        return torch.bucketize(x.to(torch.float32), self.thresholds, right=True)

    def quantize(self, x: Tensor) -> Tensor:
        """The codes of x."""
        return self.codes[self.rank(x)]

    def fake_quant(self, x: Tensor) -> Tensor:
        """The values of the codes of x, float32."""
        return self.values[self.rank(x)]


class Format(ABC):
    """A finite set of values and how a real number becomes one of them. Subclasses are frozen dataclasses."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What options, reports and files call it."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits of storage of one code."""

    @property
    def block_size(self) -> int | None:
        """How many values a block has where the format fixes it, else None: the granularity decides."""
        return None

    @property
    def qparam_bits(self) -> int:
        """Bits of storage of the qparams of one block: here one float32 scale."""
        return 32

    def storage_bits(self, blocks: int, n: int) -> int:
        """Bits of storage of a tensor of blocks [blocks, n], its qparams included."""
        return blocks * (n * self.bits + self.qparam_bits)

    def storage_bits_per_value(self, blocks: int, n: int) -> float:
        """``storage_bits`` a value."""
        return self.storage_bits(blocks, n) / (blocks * n)

    @abstractmethod
    def fit(self, blocks: Tensor) -> QParams:
        """Qparams float32 [blocks, 1] for finite blocks [blocks, n], from their extent; searches are in ``calibration``."""

    @abstractmethod
    def quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """Codes int64 of x; those of NaN are any legal code."""

    @abstractmethod
    def dequantize(self, codes: Tensor, qparams: QParams) -> Tensor:
        """Values float32 of codes."""

    def passes(self, x: Tensor, qparams: QParams) -> Tensor:
        """Where the straight-through gradient is 1: inside of the open range of the levels (0 where x is clipped)."""
        levels = self.levels(qparams)
        return (x > levels.amin(-1, keepdim=True)) & (x < levels.amax(-1, keepdim=True))

    def slope(self, x: Tensor, value: Tensor, qparams: QParams) -> Tensor:
        """The straight-through derivative of ``fake_quant`` at float32 x, coded as ``value``: 1 where x ``passes``, else 0."""
        return self.passes(x, qparams).to(torch.float32)

    def nearest(self, x: Tensor, qparams: QParams) -> Tensor:
        """``dequantize(quantize(x))`` for float32 without NaN; a format may have a quicker way to the same bits."""
        return self.dequantize(self.quantize(x, qparams), qparams)

    def fake_quant(self, x: Tensor, qparams: QParams) -> Tensor:
        """quantize, then dequantize, in x's dtype: the same bits with gradients and without; differentiable by ``slope``."""
        wide = x.detach().to(torch.float32)
        value = self.nearest(wide, qparams)
        value = torch.where(torch.isnan(wide), wide, value).to(x.dtype)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return value
        slope = self.slope(wide, value.to(torch.float32), qparams).to(x.dtype).detach()
        linear = torch.where(torch.isfinite(x) & (slope != 0), x, torch.zeros_like(x)) * slope
        return value.detach() + (linear - linear.detach())  # x + (value - x) would round

    @property
    def code_count(self) -> int:
        """The number of codes."""
        return 1 << self.bits

    def levels(self, qparams: QParams) -> Tensor:
        """The value of every code, float32 [..., codes] for qparams [..., 1]; not sorted where codes are not."""
        codes = torch.arange(self.code_count)
        return self.dequantize(codes, qparams)

    def landmarks(self, qparams: QParams) -> Tensor:
        """Numbers that, with their float32 neighbours, meet every code in use; the levels, unless those are coded otherwise."""
        return self.levels(qparams).reshape(-1)

    def table(self, qparams: QParams) -> Table:
        """The threshold + table form for the qparams of one block, exact for every float32.

        Raises:
            FormatError: the codes do not rise (or fall) with x, so there is no such form.
        """
        one = {name: value.reshape(1) for name, value in qparams.items()}
        values = self.levels(one).reshape(-1)
        codes = self.quantize(_probe(self.landmarks(one)), one)
        order = codes[torch.cat([torch.ones(1, dtype=torch.bool), codes[1:] != codes[:-1]])]
        if len(order.unique()) < len(order):
            raise FormatError(f"{self.name}: the codes are not monotone in x, so there are no thresholds")
        return Table(self._thresholds(order, one), values[order], order)

    def _thresholds(self, order: Tensor, qparams: QParams) -> Tensor:
        """The least float32 of rank ≥ r, for r = 1 .. L - 1: a binary search over the 2^32 ordinals."""
        rank_of = torch.zeros(self.code_count, dtype=torch.int64)
        rank_of[order] = torch.arange(len(order))
        wanted = torch.arange(1, len(order))
        low, high = (torch.full_like(wanted, int(to_ordinals(torch.tensor(end)))) for end in (-math.inf, math.inf))
        for _ in range(33):
            middle = (low + high) // 2
            reaches = rank_of[self.quantize(from_ordinals(middle), qparams)] >= wanted
            low, high = torch.where(reaches, low, middle), torch.where(reaches, middle, high)
        return from_ordinals(high)


def to_ordinals(x: Tensor) -> Tensor:
    """int64 numbers in the order of float32 values; neighbours differ by 1, and both zeros are 0."""
    bits = x.to(torch.float32).view(torch.int32).to(torch.int64)
    return torch.where(bits < 0, -(bits + 2**31), bits)


def from_ordinals(ordinals: Tensor) -> Tensor:
    """The float32 values of ordinals."""
    bits = torch.where(ordinals < 0, -ordinals - 2**31, ordinals)
    return bits.to(torch.int32).view(torch.float32)


def _probe(landmarks: Tensor) -> Tensor:
    """Ascending float32 numbers that meet every code: each bfloat16, and the landmarks with their neighbours."""
    high = to_ordinals(torch.tensor(math.inf))
    coarse = torch.arange(-int(high), int(high) + 1, 1 << 16)
    exact = to_ordinals(landmarks[torch.isfinite(landmarks)])
    return from_ordinals(torch.cat([coarse, exact - 1, exact, exact + 1]).unique())


def broadcast_qparams(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Numbers as qparams of one block."""
    return {name: torch.as_tensor(value, dtype=torch.float32).reshape(-1, 1) for name, value in values.items()}
