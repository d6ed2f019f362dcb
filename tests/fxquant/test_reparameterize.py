"""The stage reparameterize of the compiler: folds by name, vectors by a calibration, bound as packed weights are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import fxquant
from fxquant.calibration.calibration import Calibration
from fxquant.config import FxQuantConfig
from fxquant.errors import CalibrationError, ConfigError
from fxquant.passes.joint import RESIDUAL
from fxquant.passes.reparam.legality import UNTIED
from fxquant.tracker import tracker

TOLERANCE = 2e-5
FLOAT: dict[str, Any] = {"scheme": "float", "float_kernels": "off", "attention": "off", "codegen": "ops"}
FOLDS = ("norm_affine", "layer_scale", "attention_scale")
WIDTH = 64


class Block(nn.Module):
    """A pre-norm block of a vision transformer with LayerScale."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.scale1, self.scale2 = (nn.Parameter(torch.rand(WIDTH) + 0.5) for _ in range(2))
        for norm in (self.norm1, self.norm2):
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.uniform_(norm.bias, -1, 1)

    def forward(self, x: Tensor) -> Tensor:
        normal = self.norm1(x)
        q, k, v = (y(normal).view(*x.shape[:2], self.heads, -1).transpose(1, 2) for y in (self.q, self.k, self.v))
        x = x + self.scale1 * self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
        return x + self.scale2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))  # type: ignore[no-any-return]


def data() -> Tensor:
    return torch.randn(2, 7, WIDTH)


def compiled(model: Any, names: tuple[str, ...] = FOLDS, **options: Any) -> Any:
    return torch.compile(model, backend="fxquant", options={**FLOAT, "reparameterize": names, **options})


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


def rewrites(fast: Any) -> dict[str, list[str | None]]:
    """Rule → refusals of the stage, None where it fired."""
    found: dict[str, list[str | None]] = {}
    for row in fxquant.report(fast).graphs[0].rewrites:
        if row.stage == "reparameterize":
            found.setdefault(row.rule, []).append(row.reason)
    return found


@torch.no_grad()
@pytest.mark.parametrize("codegen", ["ops", "inductor"])
def test_folds_of_a_vision_block_leave_the_function_as_it_is(codegen: str) -> None:
    model, x = Block(), data()
    fast = compiled(model, codegen=codegen)
    assert error(fast(x), model(x)) < TOLERANCE
    assert rewrites(fast) == {"norm_affine": [None] * 4, "layer_scale": [None] * 2, "attention_scale": [None]}
