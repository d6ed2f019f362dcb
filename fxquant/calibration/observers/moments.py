"""Count, mean, variance and greatest magnitude of every block, joined by Chan's formula in float64."""

import torch
from torch import Tensor

from fxquant.calibration.observers.base import BlockObserver, State


class Moments(BlockObserver):
    """State [B, 1]: ``count`` int64, ``mean``, ``squares`` (squared deviations from the mean, summed) and ``magnitude`` (the
    mean of |x|) float64, ``absmax`` float32."""

    @property
    def settings(self) -> tuple[float, ...]:
        return ()

    @property
    def count(self) -> Tensor:
        """The number of values, int64 [B, 1]."""
        return self._seen()["count"]

    @property
    def mean(self) -> Tensor:
        """float64 [B, 1]."""
        return self._seen()["mean"]

    @property
    def variance(self) -> Tensor:
        """That of the values seen (divided by their number), float64 [B, 1]."""
        return self._seen()["squares"] / self.count

    @property
    def mean_square(self) -> Tensor:
        """float64 [B, 1]."""
        return self.variance + self.mean.square()

    @property
    def magnitude(self) -> Tensor:
        """The mean of |x|, float64 [B, 1]."""
        return self._seen()["magnitude"]

    @property
    def absmax(self) -> Tensor:
        """float32 [B, 1]."""
        return self._seen()["absmax"]

    def _summarize_blocks(self, blocks: Tensor) -> State:
        wide = blocks.to(torch.float64)
        mean = wide.mean(1, keepdim=True)
        return {
            "count": torch.full((len(blocks), 1), blocks.shape[1], dtype=torch.int64),
            "mean": mean,
            "squares": (wide - mean).square().sum(1, keepdim=True),
            "magnitude": wide.abs().mean(1, keepdim=True),
            "absmax": blocks.abs().amax(1, keepdim=True),
        }

    def _join(self, first: State, second: State) -> State:
        count = first["count"] + second["count"]
        share = second["count"] / count.to(torch.float64)
        apart = second["mean"] - first["mean"]
        return {
            "count": count,
            "mean": first["mean"] + apart * share,
            "squares": first["squares"] + second["squares"] + apart.square() * share * first["count"],
            "magnitude": first["magnitude"] + (second["magnitude"] - first["magnitude"]) * share,
            "absmax": torch.maximum(first["absmax"], second["absmax"]),
        }
