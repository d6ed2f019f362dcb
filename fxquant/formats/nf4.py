"""The two 4-bit tables of bitsandbytes, NF4 and its FP4, for weights: blocks of 64 values, their largest magnitude a block.

``y = x / max|x|`` is compared with the thresholds of the published kernels, strictly (a tie takes the lower value of NF4 and
the smaller magnitude of FP4); ``x̂ = values[q] · max|x|``. FP4 is coded by sign and magnitude; it is not OCP's E2M1, from
which its values and their order differ, and code 8, which decodes to -0, stands for negative numbers that round to zero.

With ``is_double`` the largest magnitudes are 8-bit codes themselves (double quantization): less their mean over the tensor,
in blocks of 256, by the nearest of the 256 values of the dynamic map times the block's largest magnitude. Codes of x are
made with the exact magnitudes (qparam ``absmax``), values with the decoded ones (``scale``). Their mean depends on the order in
which it is summed, by an ulp or so: fit a weight once and keep the qparams.

linear-layers section 11, confirmed. The published kernels multiply by a rounded reciprocal where this file divides: a number
within an ulp of a threshold may get another code there. Blocks of a row never reach into the next row here; in
bitsandbytes they do where 64 does not divide the row.
"""

import itertools
import struct
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fxquant.formats.base import Format, QParams
from fxquant.formats.scaled import largest
from fxquant.reference import SMALLEST

BNB_BLOCK = 64
DOUBLE_BLOCK = 256  # magnitudes that share a scale in double quantization
MAP_EXPONENTS = 7  # decades of the dynamic map


@dataclass(frozen=True)
class TableCode(Format):
    """Sixteen values within ±1 by code. ``thresholds`` lie between neighbouring values, or magnitudes if ``has_sign_bit``;
    ``order`` holds the codes from the least of those up."""

    label: str
    values: tuple[float, ...]
    thresholds: tuple[float, ...]
    order: tuple[int, ...]
    has_sign_bit: bool = False
    is_double: bool = False

    @property
    def name(self) -> str:
        return self.label + ("-double" if self.is_double else "")

    @property
    def bits(self) -> int:
        return 4

    @property
    def block_size(self) -> int:
        return BNB_BLOCK

    @property
    def qparam_bits(self) -> int:
        return 8 if self.is_double else 32

    def storage_bits(self, blocks: int, n: int) -> int:
        """With double quantization also a float32 scale for 256 blocks and the mean."""
        second = 32 * (-(-blocks // DOUBLE_BLOCK) + 1) if self.is_double else 0
        return super().storage_bits(blocks, n) + second

    def fit(self, blocks: Tensor) -> QParams:
        """The largest magnitudes; with double quantization the blocks are those of one tensor in row-major order."""
        absmax = largest(blocks).clamp_min(SMALLEST)
        return {"scale": double_quantized(absmax), "absmax": absmax} if self.is_double else {"scale": absmax}

    def quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """Codes int64 0 .. 15."""
        y = x.to(torch.float32) / qparams["absmax" if self.is_double else "scale"]
        size = y.abs() if self.has_sign_bit else y
        code = torch.full_like(y, self.order[0], dtype=torch.int64)
        for threshold, above in zip(self.thresholds, self.order[1:], strict=True):
            code = torch.where(size > threshold, above, code)
        return code + ((y < 0).to(torch.int64) << 3) if self.has_sign_bit else code

    def dequantize(self, codes: Tensor, qparams: QParams) -> Tensor:
        """``values[q] · scale``, float32."""
        value = torch.zeros_like(codes, dtype=torch.float32)
        for code, entry in enumerate(self.values):
            value = torch.where(codes == code, entry, value)
        return value * qparams["scale"]

    @property
    def unit_values(self) -> Tensor:
        """``values``, float32 [16]."""
        return torch.tensor(self.values)

    def step(self, qparams: QParams) -> Tensor:
        """What a block's values are multiples of ``values`` of, float32 [blocks, 1]."""
        return qparams["scale"]

    def passes(self, x: Tensor, qparams: QParams) -> Tensor:
        """Where |x| is below the greatest level."""
        return x.abs() < qparams["scale"]


def dynamic_map() -> Tensor:
    """The 256 values of bitsandbytes' signed dynamic map, ascending float32: for each decade 10^-6 .. 1 twice as many means
    of equal parts of 0.1 .. 1 as for the one before, both signs, and 0 and 1."""
    parts = [torch.tensor([0.0, 1.0])]
    for i in range(MAP_EXPONENTS):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        means = 10.0 ** (i + 1 - MAP_EXPONENTS) * ((edges[:-1] + edges[1:]) / 2)
        parts += [means, -means]
    return torch.cat(parts).sort().values


def double_quantized(absmax: Tensor) -> Tensor:
    """Magnitudes float32 [blocks, 1] after double quantization; the floor keeps them positive."""
    levels = dynamic_map().to(absmax.device)
    mean = absmax.mean()
    rows = pad((absmax - mean).view(-1), (0, -absmax.numel() % DOUBLE_BLOCK)).view(-1, DOUBLE_BLOCK)
    scale = largest(rows).clamp_min(SMALLEST)
    codes = torch.bucketize(rows / scale, (levels[1:] + levels[:-1]) / 2)
    decoded = levels[codes] * scale + mean
    return decoded.view(-1, 1)[: absmax.numel()].clamp_min(SMALLEST)


def _float32(*values: float) -> tuple[float, ...]:
    return struct.unpack(f"{len(values)}f", struct.pack(f"{len(values)}f", *values))


_NF4_VALUES = _float32(
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_BNB_MAGNITUDES = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)  # by code

NF4 = TableCode(
    label="nf4",
    values=_NF4_VALUES,
    thresholds=_float32(*((low + high) / 2 for low, high in itertools.pairwise(_NF4_VALUES))),
    order=tuple(range(16)),
)
NF4_DOUBLE = TableCode("nf4", NF4.values, NF4.thresholds, NF4.order, is_double=True)
FP4_BNB = TableCode(
    label="fp4-bnb",
    values=_float32(*_BNB_MAGNITUDES, *(-size for size in _BNB_MAGNITUDES)),
    thresholds=_float32(0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333),
    order=(0, 1, 6, 7, 4, 5, 2, 3),
    has_sign_bit=True,
)
