"""How the extents of tokens are spread: what dynamic qparams per token would see, without keeping one number a token."""

import torch
from torch import Tensor

from fxquant.calibration.observers.base import Observer, State
from fxquant.calibration.observers.quantiles import bucket_middles, count_buckets
from fxquant.calibration.observers.samples import Samples

MANTISSA_BITS = 7


class TokenExtents(Observer):
    """State: counts int64 [2, buckets] of the tokens' least and greatest values (zero among them), the extents of both [2, 1]
    each, ``range_squares`` float64 [1] (squared extents, summed) and ``tokens`` int64 [1]. A token is a row of the last axis.
    """

    @property
    def settings(self) -> tuple[float, ...]:
        return (MANTISSA_BITS,)

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return int(self._seen()["tokens"])

    @property
    def mean_range_square(self) -> float:
        """The mean over tokens of the squared extent."""
        return float(self._seen()["range_squares"]) / self.tokens

    def quantile(self, fraction: float) -> tuple[Tensor, Tensor]:
        """(low, high) float32 [1]: of ``fraction`` of the tokens the least value is at least low, the greatest at most high.

        The relative error is at most 2^-8 (``quantiles.QuantileSketch``).
        """
        seen = self._seen()
        middles = bucket_middles(MANTISSA_BITS)
        values = torch.minimum(torch.maximum(middles, seen["least"]), seen["greatest"])
        samples = Samples(self.site, values, seen["least"], seen["greatest"], seen["counts"])
        return samples.quantile(1 - fraction)[0], samples.quantile(fraction)[1]

    def _summarize(self, x: Tensor) -> State:
        low, high = torch.aminmax(x.reshape(-1, x.shape[-1]), dim=1)
        ends = torch.stack([low.clamp_max(0), high.clamp_min(0)])
        least, greatest = torch.aminmax(ends, dim=1, keepdim=True)
        squares = (ends[1] - ends[0]).to(torch.float64).square().sum().reshape(1)
        counts = count_buckets(ends, MANTISSA_BITS)
        tokens = torch.tensor([ends.shape[1]])
        return {"counts": counts, "least": least, "greatest": greatest, "range_squares": squares, "tokens": tokens}

    def _join(self, first: State, second: State) -> State:
        added = {name: first[name] + second[name] for name in ("counts", "range_squares", "tokens")}
        least = torch.minimum(first["least"], second["least"])
        return {**added, "least": least, "greatest": torch.maximum(first["greatest"], second["greatest"])}
