"""What a search reads: values [B, n] of each block, plain or with the number of times that each was seen."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fxquant.calibration.observers.base import CHUNK, refuse_flat
from fxquant.errors import CalibrationError
from fxquant.granularity import Granularity, PerGroup, PerTensor


@dataclass(frozen=True)
class Samples:
    """Values float32 [B, n]; ``counts`` int64 [B, n] if each stands for several (then ascending along n); extent [B, 1]."""

    site: str
    values: Tensor
    low: Tensor
    high: Tensor
    counts: Tensor | None = None

    @classmethod
    def of(cls, site: str, x: Tensor, granularity: Granularity | None = None) -> Self:
        """All values of a tensor in the blocks of a granularity. (For groups of channels that share qparams over all rows:
        ``stream_blocks``, then PerChannel(0).)

        Raises:
            CalibrationError: there are none, one is not finite, or a last group would have to be filled up.
        """
        if not x.numel() or not bool(torch.isfinite(x).all()):
            raise CalibrationError(f"{site}: a search needs finite values, and at least one")
        if isinstance(granularity, PerGroup) and x.shape[-1] % granularity.size:
            raise CalibrationError(f"{site}: group size {granularity.size} does not divide {x.shape[-1]} channels")
        blocks = (granularity or PerTensor()).blocks(x.detach().to("cpu", torch.float32))
        return cls(site, blocks, *torch.aminmax(blocks, dim=1, keepdim=True))

    @property
    def block_count(self) -> int:
        """B."""
        return self.values.shape[0]

    def extent(self, *, allow_flat: bool = True) -> tuple[Tensor, Tensor]:
        """Least and greatest value, float32 [B, 1].

        Raises:
            CalibrationError: all values of a block are equal and ``allow_flat`` is False.
        """
        if not allow_flat:
            refuse_flat(self.site, self.low, self.high)
        return self.low, self.high

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """(blocks, values, counts) that together are all, at most ``CHUNK`` values each."""
        wide = min(self.values.shape[1], CHUNK)
        rows = max(1, CHUNK // max(wide, 1))
        for row in range(0, self.block_count, rows):
            blocks = slice(row, row + rows)
            for start in range(0, self.values.shape[1], wide):
                columns = slice(start, start + wide)
                yield blocks, self.values[blocks, columns], None if self.counts is None else self.counts[blocks, columns]

    def quantile(self, fraction: float) -> Tensor:
        """The quantile with linear interpolation between order statistics, float32 [B, 1], as ``numpy.quantile``.

        ``torch.quantile`` refuses more than 2^24 values; this does not.
        """
        if not 0 <= fraction <= 1:
            raise CalibrationError(f"{self.site}: a quantile is of a fraction in 0 .. 1, not {fraction}")
        if self.counts is None:
            place = fraction * (self.values.shape[1] - 1)
            lower, upper = (self._kth(int(k)) for k in (math.floor(place), math.ceil(place)))
            weight = torch.tensor(place - math.floor(place), dtype=torch.float64)
        else:
            total = self.counts.cumsum(1)
            places = fraction * (total[:, -1:].to(torch.float64) - 1)
            lower, upper = (self._kth_counted(total, k.to(torch.int64)) for k in (places.floor(), places.ceil()))
            weight = places - places.floor()
        return torch.lerp(lower.to(torch.float64), upper.to(torch.float64), weight).to(torch.float32)

    def at_rank(self, rank: Tensor) -> Tensor:
        """The order statistic of a rank [B, 1] (0 is the least value) of every block, float32 [B, 1]."""
        if self.counts is None:
            return self.values.sort(1).values.gather(1, rank)
        return self._kth_counted(self.counts.cumsum(1), rank)

    def _kth(self, rank: int) -> Tensor:
        return self.values.kthvalue(rank + 1, dim=1, keepdim=True).values

    def _kth_counted(self, total: Tensor, rank: Tensor) -> Tensor:
        """The value of rank [B, 1] among all that were counted; the first and the last are known exactly."""
        place = torch.searchsorted(total, rank, right=True).clamp_max(total.shape[1] - 1)
        value = self.values.gather(1, place)
        value = torch.where(rank == 0, self.low, value)
        return torch.where(rank == total[:, -1:] - 1, self.high, value)
