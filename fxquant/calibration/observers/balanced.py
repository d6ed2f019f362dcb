"""Gram matrix and mean of a linear's input rows in which no row weighs more than a usual one.

A row x counts ``1 / max(|x|² / K, level)``, level the median of |x|² / K over the first batch: rows of a usual size count
alike, as errors do that are added to a residual stream, and a row that is a hundred times as long (the first token of a
language model) does not drown all others.
"""

import torch
from torch import Tensor

from fxquant.calibration.observers.base import Observer, State
from fxquant.calibration.observers.gram import ROWS

SMALLEST_LEVEL = 1e-20


class BalancedGram(Observer):
    """State: ``gram`` float32 [K, K] = Σ c xᵀx, ``total`` [K] = Σ c x, ``weight`` float64 [1] = Σ c, c the counts of rows;
    ``level`` [1] (of two that are merged, the first one's), ``low`` and ``high`` [K], ``rows`` int64 [1]."""

    @property
    def settings(self) -> tuple[float, ...]:
        return ()

    @property
    def gram(self) -> Tensor:
        """The weighted mean of xᵀx, float64 [K, K]."""
        return self._seen()["gram"].to(torch.float64) / self._seen()["weight"]

    @property
    def mean(self) -> Tensor:
        """The weighted mean of x, float32 [K]."""
        return (self._seen()["total"] / self._seen()["weight"]).to(torch.float32)

    @property
    def extent(self) -> tuple[Tensor, Tensor]:
        """The least and the greatest value of every channel, float32 [K]."""
        return self._seen()["low"], self._seen()["high"]

    @property
    def rows(self) -> int:
        """The number of rows."""
        return int(self._seen()["rows"])

    def counts(self, rows: Tensor) -> Tensor:
        """c of rows [R, K], float32 [R]."""
        return _counts(rows, self._seen()["level"])

    def _summarize(self, x: Tensor) -> State:
        rows = x.reshape(-1, x.shape[-1])
        level = self._state["level"] if self._state else rows.square().mean(1).median().clamp_min(SMALLEST_LEVEL).reshape(1)
        gram = torch.zeros(rows.shape[1], rows.shape[1])
        for block in rows.split(ROWS):
            scaled = block * _counts(block, level).sqrt()[:, None]
            gram.addmm_(scaled.T, scaled)
        counts = _counts(rows, level)
        low, high = torch.aminmax(rows, dim=0)
        return {
            "gram": gram,
            "total": counts @ rows,
            "weight": counts.to(torch.float64).sum().reshape(1),
            "level": level,
            "low": low,
            "high": high,
            "rows": torch.tensor([len(rows)]),
        }

    def _join(self, first: State, second: State) -> State:
        added = {name: first[name] + second[name] for name in ("gram", "total", "weight", "rows")}
        extent = {"low": torch.minimum(first["low"], second["low"]), "high": torch.maximum(first["high"], second["high"])}
        return {**added, **extent, "level": first["level"]}


def _counts(rows: Tensor, level: Tensor) -> Tensor:
    return rows.square().mean(1).clamp_min(float(level)).reciprocal()
