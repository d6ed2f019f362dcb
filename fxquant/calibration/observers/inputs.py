"""What every calibration keeps of a linear's input: extent and mean square of its channels, mean squared extent of its rows."""

import torch
from torch import Tensor

from fxquant.calibration.observers.base import Observer, State
from fxquant.calibration.qparams import InputStatistics
from fxquant.errors import CalibrationError


class InputExtents(Observer):
    """Of rows x [..., K]. State: ``low`` and ``high`` float32 [K], zero among them; ``square`` float64 [K], the sum of
    squares; ``counts`` float64 [2]: the sum over rows of their squared extent, and the number of rows."""

    @property
    def settings(self) -> tuple[float, ...]:
        return ()

    def observe(self, x: Tensor) -> None:
        """Take the rows of x into account; an x without rows changes nothing.

        Raises:
            CalibrationError: a value is not finite, or the number of channels is not that of before.
        """
        if x.numel():
            super().observe(x)

    def statistics(self) -> InputStatistics | None:
        """What was seen; None before any data."""
        if self.is_empty:
            return None
        square, rows = self._state["counts"].tolist()
        return InputStatistics(self._state["low"], self._state["high"], self._state["square"] / rows, square / rows)

    def _checked(self, x: Tensor) -> Tensor:
        refuse_not_finite(self.site, x)
        return super()._checked(x)

    def _summarize(self, x: Tensor) -> State:
        rows = x.reshape(-1, x.shape[-1])
        extents = rows.amax(1).clamp_min(0) - rows.amin(1).clamp_max(0)
        square = float(extents.to(torch.float64).square().sum())
        return {
            "low": rows.amin(0).clamp_max(0),
            "high": rows.amax(0).clamp_min(0),
            "square": rows.to(torch.float64).square().sum(0),
            "counts": torch.tensor([square, len(rows)], dtype=torch.float64),
        }

    def _join(self, first: State, second: State) -> State:
        return {
            "low": torch.minimum(first["low"], second["low"]),
            "high": torch.maximum(first["high"], second["high"]),
            "square": first["square"] + second["square"],
            "counts": first["counts"] + second["counts"],
        }


def refuse_not_finite(site: str, x: Tensor) -> None:
    """Refuse an input with NaN or infinity.

    Raises:
        CalibrationError: naming the site.
    """
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise CalibrationError(
            f"{site}: the calibration data give an input that is not finite ({bad} of {x.numel()} values); "
            "leave this batch out, or correct it"
        )
