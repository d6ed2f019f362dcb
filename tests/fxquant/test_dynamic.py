"""fxquant adds no graph break and no recompile over any batch and sequence size."""

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

SIZES = [(2, 8), (3, 8), (3, 12), (4, 16), (1, 16), (1, 5), (7, 33), (2, 64), (5, 2), (9, 21)]


def compile_counts(model: nn.Module, dynamic: bool | None, backend: str) -> dict[str, int]:
    torch._dynamo.reset()
    counters.clear()
    options: Any = {"codegen": "ops", "scheme": "w8a8"} if backend == "fxquant" else None
    compiled = torch.compile(model, backend=backend, dynamic=dynamic, options=options)
    with torch.no_grad():
        for batch, length in SIZES:
            x = torch.randn(batch, length, 32)
            got, wanted = compiled(x), model(x)
            cosine = torch.cosine_similarity(got.flatten(), wanted.flatten(), dim=0)
            assert cosine > 0.999
    stats = counters["stats"]
    return {"graphs": stats["unique_graphs"], "breaks": sum(counters["graph_break"].values())}


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_as_many_graphs_as_without_fxquant(dynamic: bool | None) -> None:
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu").eval()
    with torch._dynamo.config.patch(recompile_limit=32):
        assert compile_counts(model, dynamic, "fxquant") == compile_counts(model, dynamic, "aot_eager")


@torch.no_grad()
def test_dynamic_sizes_through_inductor() -> None:
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32)).eval()
    compiled = torch.compile(model, backend="fxquant", dynamic=True, options={"scheme": "w8a8"})
    operators = torch.compile(model, backend="fxquant", dynamic=True, options={"scheme": "w8a8", "codegen": "ops"})
    for batch, length in SIZES:
        x = torch.randn(batch, length, 32)
        assert torch.allclose(compiled(x), operators(x), atol=2e-2)
        cosine = torch.cosine_similarity(compiled(x).flatten(), model(x).flatten(), dim=0)
        assert cosine > 0.999
