"""Quantiles in constant memory: values are counted in buckets of equal relative width, the top bits of their float32 form.

A bucket is a sign, an exponent and the first m bits of the mantissa, so its width is at most 2^-m of its least magnitude and
the middle is off by at most 2^-(m+1) of the value; magnitudes below 2^-32 are one bucket, read as 0. An order statistic
that is read off thus has a relative error ≤ 2^-(m+1), or an absolute one < 2^-32; the first and the last are exact. A
quantile lies between two neighbouring order statistics, so it has the same bound relative to the greater magnitude of
both. (A grid of equal absolute width could not promise that next to an outlier.)

Counts are added when states are joined: the result depends only on the values seen.
"""

import torch
from torch import Tensor

from fxquant.calibration.observers.base import BlockObserver, State
from fxquant.calibration.observers.samples import Samples
from fxquant.errors import CalibrationError
from fxquant.granularity import Granularity

OCTAVES = 160  # 2^-32 .. 2^128
SMALLEST_BITS = (127 - 32) << 23  # of the float32 2^-32


class QuantileSketch(BlockObserver):
    """State: ``counts`` int64 [B, 2 · 160 · 2^m + 1], ``low`` and ``high`` float32 [B, 1].

    Memory a block: 320 KiB for m = 7 (for tensors), 40 KiB for m = 4 (for channels).
    """

    def __init__(self, site: str, granularity: Granularity | None = None, *, mantissa_bits: int = 7) -> None:
        super().__init__(site, granularity)
        if not 0 <= mantissa_bits <= 12:
            raise CalibrationError(f"{site}: a sketch has 0 to 12 mantissa bits, not {mantissa_bits}")
        self.mantissa_bits = mantissa_bits

    @property
    def settings(self) -> tuple[float, ...]:
        return (self.mantissa_bits,)

    @property
    def relative_error(self) -> float:
        """The greatest relative error of an order statistic."""
        return 2.0 ** -(self.mantissa_bits + 1)

    def samples(self) -> Samples:
        """The buckets' middles with their counts, for searches."""
        seen = self._seen()
        middles = bucket_middles(self.mantissa_bits)
        values = torch.minimum(torch.maximum(middles, seen["low"]), seen["high"])
        return Samples(self.site, values, seen["low"], seen["high"], seen["counts"])

    def quantile(self, fraction: float) -> Tensor:
        """The quantile of everything seen, float32 [B, 1]."""
        return self.samples().quantile(fraction)

    @property
    def _state_size(self) -> int:
        return (2 * OCTAVES) << self.mantissa_bits

    def _summarize_blocks(self, blocks: Tensor) -> State:
        low, high = torch.aminmax(blocks, dim=1, keepdim=True)
        return {"counts": count_buckets(blocks, self.mantissa_bits), "low": low, "high": high}

    def _join(self, first: State, second: State) -> State:
        return {
            "counts": first["counts"] + second["counts"],
            "low": torch.minimum(first["low"], second["low"]),
            "high": torch.maximum(first["high"], second["high"]),
        }


def count_buckets(blocks: Tensor, mantissa_bits: int) -> Tensor:
    """How many values of each block [B, n] are in each bucket, int64 [B, buckets], in the order of the values."""
    side = OCTAVES << mantissa_bits
    bits = blocks.contiguous().view(torch.int32).to(torch.int64) & 0x7FFFFFFF
    step = ((bits - SMALLEST_BITS) >> (23 - mantissa_bits)) + 1  # 1 .. side; 0 and below for what is read as zero
    place = side + torch.where(blocks < 0, -1, 1) * step.clamp_min(0)
    place += (2 * side + 1) * torch.arange(len(blocks))[:, None]
    counts = torch.bincount(place.reshape(-1), minlength=len(blocks) * (2 * side + 1))
    return counts.reshape(len(blocks), 2 * side + 1)


def bucket_middles(mantissa_bits: int) -> Tensor:
    """The middle of every bucket, float32 [buckets]."""
    steps = torch.arange(OCTAVES << mantissa_bits)
    bits = (steps << (23 - mantissa_bits)) + SMALLEST_BITS + (1 << (22 - mantissa_bits))
    positive = bits.to(torch.int32).view(torch.float32)
    return torch.cat([-positive.flip(0), torch.zeros(1), positive])
