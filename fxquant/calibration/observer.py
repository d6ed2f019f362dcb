"""Min-max statistics of every linear's input, in memory that does not grow with the data."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fxquant.calibration.qparams import InputStatistics
from fxquant.errors import CalibrationError


class MinMaxObserver:
    """Running extent and mean square of the rows of one linear's input; ``site`` is its name, for errors."""

    def __init__(self, site: str) -> None:
        self._site = site
        self._low: Tensor | None = None
        self._high: Tensor | None = None
        self._square: Tensor | None = None
        self._range_square = 0.0
        self._tokens = 0

    def observe(self, x: Tensor) -> None:
        """Take the rows of x [..., K] into account.

        Raises:
            CalibrationError: a value is not finite.
        """
        rows = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)
        if not rows.shape[0]:
            return
        if not torch.isfinite(rows).all():
            raise CalibrationError(f"{self._site}: the calibration data give an input that is not finite")
        low, high = rows.amin(0).clamp_max(0), rows.amax(0).clamp_min(0)
        square = rows.to(torch.float64).square().sum(0)
        extents = rows.amax(1).clamp_min(0) - rows.amin(1).clamp_max(0)
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)
        self._square = square if self._square is None else self._square + square
        self._range_square += float(extents.to(torch.float64).square().sum())
        self._tokens += rows.shape[0]

    def state(self) -> dict[str, Tensor]:
        """A copy of everything that was seen; empty before any data."""
        if self._low is None or self._high is None or self._square is None:
            return {}
        counts = torch.tensor([self._range_square, self._tokens], dtype=torch.float64)
        return {"low": self._low.clone(), "high": self._high.clone(), "square": self._square.clone(), "counts": counts}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        if state:
            self._low, self._high, self._square = (state[name].clone() for name in ("low", "high", "square"))
            self._range_square, self._tokens = float(state["counts"][0]), int(state["counts"][1])

    def statistics(self) -> InputStatistics | None:
        """What was seen; None before any data."""
        if self._low is None or self._high is None or self._square is None:
            return None
        return InputStatistics(self._low, self._high, self._square / self._tokens, self._range_square / self._tokens)
