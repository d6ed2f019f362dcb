"""Attention is rewritten only where its mask is provably finite, and its result keeps the layout that later views need."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxquant

LINEAR = nn.Linear(8, 8)
Q = torch.randn(1, 2, 4, 8)


def attend(mask: Tensor) -> Tensor:
    q = LINEAR(Q)
    return torch.softmax(q @ Q.transpose(-1, -2) * 0.3 + mask, -1) @ Q


def written_through_a_view(hidden: Tensor) -> Tensor:
    mask = torch.where(hidden, 0.0, -1000.0)
    mask[1].fill_(-float("inf"))
    return attend(mask)


def overflowed_in_half_precision(hidden: Tensor) -> Tensor:
    mask = torch.where(hidden, 0.0, -60000.0).to(torch.float16) * 2.0
    return attend(mask.to(torch.float32))


def added_with_a_factor(hidden: Tensor) -> Tensor:
    mask = torch.where(hidden, 0.0, -1e38)
    return attend(torch.add(mask, mask, alpha=100))


@torch.no_grad()
@pytest.mark.parametrize("function", [written_through_a_view, overflowed_in_half_precision, added_with_a_factor])
def test_a_fully_masked_row_stays_nan(function: Callable[[Tensor], Tensor]) -> None:
    hidden = torch.ones(4, 4, dtype=torch.bool)
    hidden[1] = False
    wanted = function(hidden)
    assert wanted.isnan().any()
    compiled = torch.compile(function, backend="fxquant", options={"codegen": "ops", "scheme": "w8a8"})
    assert torch.equal(compiled(hidden).isnan(), wanted.isnan())
    assert not any(row.fired for graph in fxquant.report(compiled).graphs for row in graph.rewrites)


@torch.no_grad()
def test_a_later_view_still_works() -> None:
    def function(x: Tensor) -> Tensor:
        q = LINEAR(x).view(2, 4, 2, 4).transpose(1, 2)
        return (torch.softmax(q @ q.transpose(-1, -2) * 0.5, -1) @ q).view(2, -1)

    x = torch.randn(2, 4, 8)
    compiled = torch.compile(function, backend="fxquant", options={"codegen": "ops", "scheme": "w8a8"})
    assert torch.allclose(compiled(x), function(x), atol=0.05)
    assert any(row.fired for graph in fxquant.report(compiled).graphs for row in graph.rewrites)
