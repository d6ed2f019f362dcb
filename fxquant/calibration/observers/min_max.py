"""Least and greatest value of every block."""

import torch
from torch import Tensor

from fxquant.calibration.observers.base import BlockObserver, State, refuse_flat


class MinMax(BlockObserver):
    """State: ``low`` and ``high`` float32 [B, 1]. Joining is exact and commutative."""

    @property
    def settings(self) -> tuple[float, ...]:
        return ()

    def extent(self, *, allow_flat: bool = True) -> tuple[Tensor, Tensor]:
        """low, high as seen; zero need not be among them.

        Raises:
            CalibrationError: no data; or all values of a block are equal and ``allow_flat`` is False.
        """
        low, high = self._seen()["low"], self._seen()["high"]
        if not allow_flat:
            refuse_flat(self.site, low, high)
        return low, high

    def _summarize_blocks(self, blocks: Tensor) -> State:
        low, high = torch.aminmax(blocks, dim=1, keepdim=True)
        return {"low": low, "high": high}

    def _join(self, first: State, second: State) -> State:
        return {
            "low": torch.minimum(first["low"], second["low"]),
            "high": torch.maximum(first["high"], second["high"]),
        }
