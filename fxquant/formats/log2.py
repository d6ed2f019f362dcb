"""log2 codes: ``q = rne(-log2(x / δ))``, ``x̂ = δ 2^-q``; a product with them is a shift (FQ-ViT).

    >>> import torch
    >>> form = Log2(2, "reserve_top")
    >>> form.levels({"scale": torch.ones(1, 1)})
    tensor([[1.0000, 0.5000, 0.2500, 0.0000]])

vit-quantizers section 3, confirmed; δ = 1 there, which is what ``fit`` gives.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.formats.base import QParams
from fxquant.formats.log_codes import LogFormat, check_width, log2_codes, powers_of_two


@dataclass(frozen=True)
class Log2(LogFormat):
    """Powers of two times a scale; qparams: scale. For attention probabilities.

    Up to 7 bits: 2^-255 is no float32. The quotient x / δ is a float32 division, its logarithm is rounded exactly.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        check_width(self.family, self.width, 7)

    @property
    def family(self) -> str:
        return "log2"

    def fit(self, blocks: Tensor) -> QParams:
        """δ = 1 for every block."""
        return {"scale": torch.ones_like(blocks[:, :1], dtype=torch.float32)}

    def rounded_log(self, x: Tensor, qparams: QParams) -> Tensor:
        """``rne(-log2(x / δ))``."""
        return log2_codes(x.clamp_min(0) / qparams["scale"])

    def magnitudes(self, codes: Tensor, qparams: QParams) -> Tensor:
        """``δ 2^-q``."""
        return powers_of_two(-codes) * qparams["scale"]
