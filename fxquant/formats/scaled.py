"""What formats of a grid times a step have in common: ``q = encode(x / step)``, ``x̂ = decode(q) · step``.

``/`` is true division and everything is float32. The table form gives the values of every float32 and the codes of every
one but -0.0, which comparisons cannot tell from 0: it gives the code of +0 where ``quantize`` keeps the sign.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from fxquant.formats.base import Format, QParams
from fxquant.formats.grids import Grid
from fxquant.reference import SMALLEST


class ScaledGrid(Format):
    """A grid times a step that the qparams give."""

    grid: Grid

    @property
    def bits(self) -> int:
        return self.grid.bits

    @property
    def unit_values(self) -> Tensor:
        """What the codes stand for with a step of 1, float32 [codes]."""
        return self.grid.decode(torch.arange(1 << self.bits))

    @abstractmethod
    def step(self, qparams: QParams) -> Tensor:
        """What a block's values are multiples of the grid's values of, float32 [blocks, 1]."""

    def quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """Codes int64 as they are stored."""
        return self.grid.encode(x.to(torch.float32) / self.step(qparams))

    def dequantize(self, codes: Tensor, qparams: QParams) -> Tensor:
        """Values float32."""
        return self.grid.decode(codes) * self.step(qparams)

    def nearest(self, x: Tensor, qparams: QParams) -> Tensor:
        """The grid's nearest value, with no code in between."""
        step = self.step(qparams)
        return self.grid.nearest(x / step) * step

    def passes(self, x: Tensor, qparams: QParams) -> Tensor:
        """Where |x| is below the greatest level."""
        return x.abs() < self.grid.maximum * self.step(qparams)


def largest(blocks: Tensor) -> Tensor:
    """The largest magnitude of every block, float32 [blocks, 1]."""
    return blocks.to(torch.float32).abs().amax(-1, keepdim=True)


def scale_to(largest_magnitude: Tensor, maximum: float) -> Tensor:
    """The step that puts a block's largest magnitude on the grid's greatest value; a floor keeps a block of zeros legal."""
    return (largest_magnitude / maximum).clamp_min(SMALLEST)
