"""Small floating-point codes with one float32 scale a block: FP8 (E4M3, E5M2), FP6 (E2M3, E3M2), FP4 (E2M1).

``s = max|x| / maximum``, ``q = encode(x / s)``, ``x̂ = decode(q) · s`` with the rounding and saturation of ``grids``.
"""

from dataclasses import dataclass

from torch import Tensor

from fxquant.formats.base import QParams
from fxquant.formats.grids import FloatGrid
from fxquant.formats.scaled import ScaledGrid, largest, scale_to


@dataclass(frozen=True)
class Minifloat(ScaledGrid):
    """A float grid times ``scale``."""

    grid: FloatGrid

    @property
    def name(self) -> str:
        return f"fp{self.bits}-{self.grid.name}"

    def fit(self, blocks: Tensor) -> QParams:
        """The largest magnitude of a block becomes the greatest level."""
        return {"scale": scale_to(largest(blocks), self.grid.maximum)}

    def step(self, qparams: QParams) -> Tensor:
        return qparams["scale"]
