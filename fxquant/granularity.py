"""Granularity: which values of a tensor share qparams. Every one views a tensor as blocks [blocks, n], one qparam a block.

| granularity | a block is |
|---|---|
| PerTensor() | the whole tensor |
| PerChannel(axis) | one index of one axis |
| PerToken() | one row of the last axis |
| PerGroup(size) | ``size`` neighbours of the last axis; the last group of a row may be shorter |
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from fxquant.errors import FormatError


class Granularity(Protocol):
    """A bijection between a tensor and its blocks, apart from padding."""

    def blocks(self, x: Tensor) -> Tensor:
        """x as [blocks, n]."""

    def restore(self, blocks: Tensor, like: Tensor) -> Tensor:
        """Blocks in the shape of the tensor that they were made from."""


@dataclass(frozen=True)
class PerTensor:
    """One block."""

    def __str__(self) -> str:
        return "per tensor"

    def blocks(self, x: Tensor) -> Tensor:
        """x as [1, numel]."""
        return x.reshape(1, -1)

    def restore(self, blocks: Tensor, like: Tensor) -> Tensor:
        """The inverse of ``blocks``."""
        return blocks.reshape(like.shape)


@dataclass(frozen=True)
class PerChannel:
    """One block an index of ``axis``."""

    axis: int

    def __str__(self) -> str:
        return f"per channel of axis {self.axis}"

    def blocks(self, x: Tensor) -> Tensor:
        """x as [x.shape[axis], rest].

        Raises:
            FormatError: x has no such axis.
        """
        if not -x.dim() <= self.axis < x.dim():
            raise FormatError(f"{self}: a tensor of shape {tuple(x.shape)} has no axis {self.axis}")
        return x.movedim(self.axis, 0).reshape(x.shape[self.axis], -1)

    def restore(self, blocks: Tensor, like: Tensor) -> Tensor:
        """The inverse of ``blocks``."""
        return blocks.reshape(like.movedim(self.axis, 0).shape).movedim(0, self.axis)


@dataclass(frozen=True)
class PerToken:
    """One block a row of the last axis."""

    def __str__(self) -> str:
        return "per token"

    def blocks(self, x: Tensor) -> Tensor:
        """x as [rows, K]."""
        return x.reshape(-1, x.shape[-1])

    def restore(self, blocks: Tensor, like: Tensor) -> Tensor:
        """The inverse of ``blocks``."""
        return blocks.reshape(like.shape)


@dataclass(frozen=True)
class PerGroup:
    """One block ``size`` neighbours of the last axis; a short last group is filled up with zeros, which change no extent
    that contains zero."""

    size: int

    def __str__(self) -> str:
        return f"per group of {self.size}"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise FormatError(f"a group has at least one value, not {self.size}")

    def blocks(self, x: Tensor) -> Tensor:
        """x as [rows · ceil(K / size), size]."""
        return pad(x, (0, -x.shape[-1] % self.size)).reshape(-1, self.size)

    def restore(self, blocks: Tensor, like: Tensor) -> Tensor:
        """The inverse of ``blocks``; the padding is cut off."""
        rows = blocks.reshape(*like.shape[:-1], -1)
        return rows[..., : like.shape[-1]]


GRANULARITIES: dict[str, Any] = {kind.__name__: kind for kind in (PerTensor, PerChannel, PerToken, PerGroup)}


def blockwise_extent(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest value of every block, zero among them, float32 [blocks, 1]."""
    low, high = torch.aminmax(blocks.to(torch.float32), dim=-1, keepdim=True)
    return low.clamp_max(0), high.clamp_min(0)
