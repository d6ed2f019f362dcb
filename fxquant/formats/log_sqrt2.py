"""log√2 codes: ``q = rne(-2 log2(x / δ))``, ``x̂ = δ 2^-ceil(q / 2) (1 + (q mod 2) (√2 - 1))`` (RepQ-ViT).

Products are shifts with one accumulator for even and one for odd codes (``reference.log_softmax_codes``).

    >>> import torch
    >>> form = LogSqrt2(2, "reserve_top")
    >>> form.levels({"scale": torch.ones(1, 1)})
    tensor([[1.0000, 0.7071, 0.5000, 0.0000]])

vit-quantizers section 5.1, confirmed. There δ is the quantile of x with the least squared error; ``fit`` gives the maximum,
the quantiles are a search.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.formats.base import QParams
from fxquant.formats.log_codes import LogFormat, check_width, log_sqrt2_codes, powers_of_two
from fxquant.granularity import blockwise_extent
from fxquant.reference import SMALLEST


@dataclass(frozen=True)
class LogSqrt2(LogFormat):
    """Powers of √2 times a scale; qparams: scale. For attention probabilities.

    The quotient x / δ is a float32 division, its logarithm is rounded exactly; √2 is the float32 nearest to it.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        check_width(self.family, self.width, 8)

    @property
    def family(self) -> str:
        return "log-sqrt2"

    def fit(self, blocks: Tensor) -> QParams:
        """δ = the greatest value of every block."""
        return {"scale": blockwise_extent(blocks)[1].clamp_min(SMALLEST)}

    def rounded_log(self, x: Tensor, qparams: QParams) -> Tensor:
        """``rne(-2 log2(x / δ))``."""
        return log_sqrt2_codes(x.clamp_min(0) / qparams["scale"])

    def magnitudes(self, codes: Tensor, qparams: QParams) -> Tensor:
        """``δ (2^-ceil(q / 2) · (√2 if q is odd))``, rounded once or twice."""
        factor = torch.where(codes % 2 == 1, math.sqrt(2.0), 1.0)
        return powers_of_two(-((codes + 1) // 2)) * factor * qparams["scale"]
