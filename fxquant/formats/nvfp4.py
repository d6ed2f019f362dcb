"""NVFP4: E2M1 codes in blocks of 16, one E4M3 scale a block, one float32 scale G a tensor.

    G = max|x| / (448 · 6)           over the tensor
    s = E4M3(clamp(max|x| / 6 / G, 2^-9, 448))   over a block
    x̂ = decode(q) · (s · G),  q = encode(x / (s · G))

Everything is float32 in this order, ``/`` is true division and ``s · G`` is rounded once. G is what TensorRT-LLM's ModelOpt
and torchao store; compressed-tensors stores 1 / G. Weights that one product multiplies share G: fit them with the greatest.
linear-layers section 12, confirmed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.formats.base import QParams
from fxquant.formats.grids import E2M1, E4M3, FloatGrid
from fxquant.formats.scaled import ScaledGrid, largest, scale_to

NVFP4_BLOCK = 16
LEAST_SCALE = 2.0**-9  # the least E4M3 number above 0


@dataclass(frozen=True)
class Nvfp4(ScaledGrid):
    """E2M1 times ``scale`` times ``tensor_scale``; the latter is the same in all blocks."""

    grid: FloatGrid = E2M1

    @property
    def name(self) -> str:
        return "nvfp4"

    @property
    def block_size(self) -> int:
        return NVFP4_BLOCK

    @property
    def qparam_bits(self) -> int:
        return E4M3.bits

    def storage_bits(self, blocks: int, n: int) -> int:
        """As of every format, and the tensor's own scale."""
        return super().storage_bits(blocks, n) + 32

    def fit(self, blocks: Tensor) -> QParams:
        """Both scales from the largest magnitudes."""
        return self.fit_with(blocks, scale_to(largest(blocks).amax(), E4M3.maximum * self.grid.maximum))

    def fit_with(self, blocks: Tensor, tensor_scale: Tensor) -> QParams:
        """The block scales for a tensor scale that is given (static activations, weights that share one)."""
        raw = largest(blocks) / self.grid.maximum / tensor_scale
        scale = E4M3.decode(E4M3.encode(raw.clamp(LEAST_SCALE, E4M3.maximum)))
        return {"scale": scale, "tensor_scale": tensor_scale.to(torch.float32).expand_as(scale)}

    def step(self, qparams: QParams) -> Tensor:
        return qparams["scale"] * qparams["tensor_scale"]
