"""A histogram whose range doubles when a value falls outside: N bins of width 2^e on a grid that starts at zero.

Bin i of -N/2 .. N/2 - 1 counts the values in [i 2^e, (i + 1) 2^e). Grids of different e are nested, so doubling adds pairs
of bins and the state depends only on the values seen, neither on their order nor on the batches.

Resolution: e is the least with all values inside, so 2^e ≤ 4 max|x| / N (or 2^-126). A value that is read off is its bin's
centre, clipped to the extent: off by at most half of 2^e.
"""

import torch
from torch import Tensor

from fxquant.calibration.observers.base import BlockObserver, State
from fxquant.calibration.observers.samples import Samples
from fxquant.errors import CalibrationError
from fxquant.granularity import Granularity

SMALLEST_EXPONENT = -126  # the least normal float32


class Histogram(BlockObserver):
    """State: ``counts`` int64 [B, N], ``exponent`` int64 [B, 1], ``low`` and ``high`` float32 [B, 1]; N is a power of two."""

    def __init__(self, site: str, granularity: Granularity | None = None, *, bins: int = 4096) -> None:
        super().__init__(site, granularity)
        if bins < 4 or bins & (bins - 1):
            raise CalibrationError(f"{site}: a histogram has a power of two of bins, at least 4, not {bins}")
        self.bins = bins

    @property
    def settings(self) -> tuple[float, ...]:
        return (self.bins,)

    @property
    def width(self) -> Tensor:
        """The width of a bin, float32 [B, 1]."""
        return torch.exp2(self._seen()["exponent"].to(torch.float32))

    @property
    def magnitudes(self) -> Tensor:
        """The number of values with |x| in [i w, (i + 1) w), int64 [B, N/2]; a negative one on an edge counts below it."""
        low, high = self._seen()["counts"].chunk(2, dim=1)
        return low.flip(1) + high

    def samples(self) -> Samples:
        """The bins' centres with their counts, for searches."""
        seen = self._seen()
        centres = (torch.arange(self.bins) - self.bins // 2 + 0.5) * self.width
        values = torch.minimum(torch.maximum(centres, seen["low"]), seen["high"])
        return Samples(self.site, values, seen["low"], seen["high"], seen["counts"])

    @property
    def _state_size(self) -> int:
        return self.bins

    def _summarize_blocks(self, blocks: Tensor) -> State:
        low, high = torch.aminmax(blocks, dim=1, keepdim=True)
        peak = torch.maximum(-low, high)
        # frexp: peak < 2^exponent of frexp, so the top bin is the one below N/2.
        exponent = torch.frexp(peak).exponent.to(torch.int64) - (self.bins // 2).bit_length() + 1
        exponent = torch.where(peak > 0, exponent, SMALLEST_EXPONENT).clamp_min(SMALLEST_EXPONENT)
        # In float64, where no quotient of float32 numbers underflows: tiny negative values stay in bin -1.
        steps = torch.floor(blocks.to(torch.float64) * torch.exp2(-exponent.to(torch.float64)))
        place = steps.to(torch.int64) + self.bins // 2
        place += self.bins * torch.arange(len(blocks))[:, None]
        counts = torch.bincount(place.reshape(-1), minlength=len(blocks) * self.bins).reshape(len(blocks), self.bins)
        return {"counts": counts, "exponent": exponent, "low": low, "high": high}

    def _join(self, first: State, second: State) -> State:
        exponent = torch.maximum(first["exponent"], second["exponent"])
        return {
            "counts": self._widened(first, exponent) + self._widened(second, exponent),
            "exponent": exponent,
            "low": torch.minimum(first["low"], second["low"]),
            "high": torch.maximum(first["high"], second["high"]),
        }

    def _widened(self, state: State, exponent: Tensor) -> Tensor:
        """Counts on the grid of a greater or equal exponent."""
        shift = (exponent - state["exponent"]).clamp_max(62)
        if not bool(shift.any()):
            return state["counts"]
        place = ((torch.arange(self.bins) - self.bins // 2) >> shift) + self.bins // 2
        return torch.zeros_like(state["counts"]).scatter_add_(1, place, state["counts"])
