"""Moving average of the extent, or of a pair of quantiles, of the batches: m ← m + σ (m_batch - m), the first batch starts.

FQ-ViT: σ = 0.01; min-max, or the 0.99999 and 0.00001 quantiles for its percentile. vit-quantizers section 2, confirmed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fxquant.calibration.observers.base import BlockObserver, State, refuse_flat
from fxquant.calibration.observers.samples import Samples
from fxquant.errors import CalibrationError
from fxquant.granularity import Granularity


class EmaExtent(BlockObserver):
    """State float64 [B, 1]: the averages ``low`` and ``high``, those of the first batch alone, and the number of batches [1].

    The first batch is kept for joining: with σ' = 1 - σ and n batches on the right,
    ``m = m_right + σ'^n (m_left - first_right)``, which is what one observer of all the batches in order has.
    """

    def __init__(
        self, site: str, granularity: Granularity | None = None, *, momentum: float = 0.01, quantile: float = 1.0
    ) -> None:
        super().__init__(site, granularity)
        if not 0 < momentum <= 1 or not 0.5 < quantile <= 1:
            raise CalibrationError(f"{site}: momentum {momentum} is not in (0, 1] or quantile {quantile} not in (0.5, 1]")
        self.momentum, self.quantile = momentum, quantile

    @property
    def settings(self) -> tuple[float, ...]:
        return (self.momentum, self.quantile)

    def extent(self, *, allow_flat: bool = True) -> tuple[Tensor, Tensor]:
        """low, high, float32 [B, 1].

        Raises:
            CalibrationError: no data; or low equals high in a block and ``allow_flat`` is False.
        """
        low, high = (self._seen()[name].to(torch.float32) for name in ("low", "high"))
        if not allow_flat:
            refuse_flat(self.site, low, high)
        return low, high

    def _summarize_blocks(self, blocks: Tensor) -> State:
        low, high = torch.aminmax(blocks, dim=1, keepdim=True)
        if self.quantile < 1:
            samples = Samples(self.site, blocks, low, high)
            low, high = samples.quantile(1 - self.quantile), samples.quantile(self.quantile)
        low, high = low.to(torch.float64), high.to(torch.float64)
        return {"low": low, "high": high, "first_low": low, "first_high": high, "batches": torch.ones(1, dtype=torch.int64)}

    def _parts(self, blocks: Tensor) -> Sequence[Tensor]:
        """The batch is the unit of the average."""
        return (blocks,)

    def _join(self, first: State, second: State) -> State:
        keep = (1 - self.momentum) ** int(second["batches"])
        joined = {name: second[name] + keep * (first[name] - second[f"first_{name}"]) for name in ("low", "high")}
        starts = {name: first[name] for name in ("first_low", "first_high")}
        return {**joined, **starts, "batches": first["batches"] + second["batches"]}
