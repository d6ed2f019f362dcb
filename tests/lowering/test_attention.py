"""Fused attention against scaled_dot_product_attention of PyTorch and against float64, on every instruction set.

Tolerances are relative to max|V|: 2e-6 to PyTorch's float32 result, and to float64 at most three times PyTorch's own
error or 1e-6.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fxquant.ops
from fxquant.config import ISAS
from fxquant.lowering.cpu.build import load_library
from fxquant.lowering.isa import available_isas

assert fxquant.ops.LIBRARY is not None
scaled_dot_product_attention: Any = torch.nn.functional.scaled_dot_product_attention
NAMES = ("q", "k", "v", "mask")
# batch, heads, key heads, queries, keys, head size, head size of the values
SHAPES = {
    "one element": (1, 1, 1, 1, 1, 1, 1),
    "decoding, one chunk": (1, 2, 2, 1, 37, 32, 32),
    "decoding, chunks merged": (2, 3, 3, 1, 1000, 64, 64),
    "decoding, grouped heads, ragged size": (2, 8, 2, 1, 300, 40, 40),
    "decoding, many heads a key head": (2, 16, 2, 1, 300, 64, 64),
    "four rows in place": (1, 2, 2, 4, 515, 17, 17),
    "rows in place, two query heads": (1, 4, 2, 2, 1030, 72, 56),
    "one strip": (1, 2, 2, 5, 16, 16, 16),
    "packed by the worker": (2, 4, 4, 128, 128, 32, 32),
    "ragged everywhere": (1, 4, 4, 197, 131, 33, 33),
    "value heads of another size": (1, 2, 2, 20, 40, 48, 24),
    "shared packing, one head": (1, 1, 1, 200, 300, 64, 64),
    "shared packing, three heads, two key blocks": (1, 3, 3, 130, 700, 40, 40),
    "grouped heads": (2, 6, 2, 50, 70, 64, 64),
    "largest head": (1, 1, 1, 9, 30, 256, 256),
    "more rows than take turns": (1, 2, 2, 300, 530, 24, 24),
    "more queries than keys": (1, 2, 2, 90, 33, 32, 32),
}


@pytest.fixture(params=[ISAS.index(isa) for isa in available_isas()], ids=lambda i: ISAS[i])
def isa(request: pytest.FixtureRequest) -> Iterator[int]:
    load_library(isa=request.param)
    yield request.param
    load_library()


def sample(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as views of [B, N, H, d] memory."""
    batch, heads, key_heads, n, m, d, e = SHAPES[name]
    sizes = ((n, heads, d), (m, key_heads, d), (m, key_heads, e))
    q, k, v = (torch.randn(batch, *size).transpose(1, 2) for size in sizes)
    return q, k, v


def run(*args: Any, **named: Any) -> Tensor:
    """fxquant::attention(q, k, v) with no mask, not causal and the scale of the head size unless given."""
    out: Tensor = torch.ops.fxquant.attention(
        **{"mask": None, "is_causal": False, "scale": None} | dict(zip(NAMES, args, strict=False)) | named
    )
    return out


def assert_attends(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> None:
    named: dict[str, Any] = {"is_causal": causal, "enable_gqa": q.dim() == 4}
    wanted = scaled_dot_product_attention(q, k, v, mask, **named)
    wide = None if mask is None else mask if mask.dtype == torch.bool else mask.double()
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), wide, **named)
    got = run(q, k, v, mask, is_causal=causal)
    assert got.shape == wanted.shape
    assert torch.equal(got.isnan(), wanted.isnan())
    largest = float(v.nan_to_num().abs().max())
    assert float((got - wanted).nan_to_num().abs().max()) <= 2e-6 * largest
    own, theirs = (float((y - exact).nan_to_num().abs().max()) / largest for y in (got, wanted))
    assert own <= max(3 * theirs, 1e-6)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("name", SHAPES)
def test_it_equals_pytorch(name: str, causal: bool, isa: int) -> None:
    assert_attends(*sample(name), causal=causal)


def masks(n: int, m: int) -> dict[str, Tensor]:
    seen = torch.rand(n, m) > 0.4
    seen[:, 0] = True
    hidden_row = seen.clone()
    hidden_row[n // 2] = False
    added = torch.randn(n, m)
    lowest = torch.finfo(torch.float32).min
    return {
        "bool": seen,
        "bool, a row hidden": hidden_row,
        "bool, of keys": seen[:1],
        "bool, a batch": seen.expand(2, 1, n, m),
        "added": added,
        "added a head": torch.randn(1, 2, n, m),
        "added, of keys": added[:1],
        "added, transposed": torch.randn(m, n).t(),
        "added, one a query": added[:, :1],
        "-inf": torch.where(seen, 0.0, -math.inf),
        "-inf, a row hidden": torch.where(hidden_row, added, -math.inf),
        "lowest": torch.where(seen, 0.0, lowest),
        "lowest, a row hidden": torch.where(hidden_row, 0.0, lowest),
        "all hidden": torch.full((n, m), -math.inf),
        "NaN": torch.where(seen, 0.0, math.nan),
    }


@pytest.mark.parametrize("size", [(1, 600), (33, 70), (40, 600)], ids=["in place", "one block", "two blocks"])
@pytest.mark.parametrize("kind", masks(1, 1))
def test_masks_mean_what_they_mean_in_pytorch(kind: str, size: tuple[int, int], isa: int) -> None:
    n, m = size
    q, k, v = torch.randn(2, 2, n, 24), torch.randn(2, 2, m, 24), torch.randn(2, 2, m, 24)
    assert_attends(q, k, v, masks(n, m)[kind])


@pytest.mark.parametrize("n", [1, 30], ids=["in place", "packed"])
def test_a_hidden_row_is_zero_or_uniform(n: int, isa: int) -> None:
    q, k, v = torch.randn(1, 1, n, 8), torch.randn(1, 1, 20, 8), torch.randn(1, 1, 20, 8)
    assert run(q, k, v, torch.zeros(n, 20, dtype=torch.bool)).abs().max() == 0
    assert run(q, k, v, torch.full((n, 20), -math.inf)).abs().max() == 0
    uniform = run(q, k, v, torch.full((n, 20), torch.finfo(torch.float32).min))
    torch.testing.assert_close(uniform, v.mean(2, keepdim=True).expand_as(uniform))


@pytest.mark.parametrize("n", [1, 40], ids=["in place", "packed"])
@pytest.mark.parametrize("place", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_hidden(place: str, value: float, n: int, isa: int) -> None:
    named = {"q": torch.randn(1, 2, n, 32), "k": torch.randn(1, 2, 600, 32), "v": torch.randn(1, 2, 600, 32)}
    named[place][0, 1, 0, 3] = value
    got, wanted = run(**named), scaled_dot_product_attention(*named.values())
    assert torch.equal(got.isfinite(), wanted.isfinite())


def test_huge_and_equal_scores(isa: int) -> None:
    v = torch.randn(1, 1, 50, 16)
    for q, k in ((torch.randn(1, 1, 20, 16) * 300, torch.randn(1, 1, 50, 16)), (torch.zeros(1, 1, 20, 16), v)):
        exact = scaled_dot_product_attention(q.double(), k.double(), v.double())
        assert float((run(q, k, v) - exact).abs().max()) < 1e-3 * float(v.abs().max())


@pytest.mark.parametrize("name", SHAPES)
def test_any_number_of_threads_gives_the_same_bits(name: str) -> None:
    q, k, v = sample(name)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results += [run(q, k, v), run(q, k, v, is_causal=True)]
    finally:
        torch.set_num_threads(threads)
    for i in (2, 4):
        assert torch.equal(results[i], results[0])
        assert torch.equal(results[i + 1], results[1])


def test_every_layout_gives_the_same_bits() -> None:
    packed = torch.randn(2, 30, 3, 4, 32)
    q, k, v = (part.transpose(1, 2) for part in packed.unbind(2))
    wanted = run(q, k, v)
    assert torch.equal(run(*(x.contiguous() for x in (q, k, v))), wanted)
    assert torch.equal(run(*(x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))), wanted)  # stride not 1
    assert wanted.transpose(1, 2).is_contiguous()
    flat = run(*(x.reshape(8, 30, 32) for x in (q, k, v)))
    assert torch.equal(flat, wanted.reshape(8, 30, 32))


def test_every_value_is_written() -> None:
    """A tensor freed just before leaves NaN in the memory that the result is likely to take."""
    q, k, v = sample("ragged everywhere")
    torch.full_like(q.contiguous(), math.nan)
    assert run(q, k, v).isfinite().all()


def test_a_written_scale() -> None:
    q, k, v = sample("one strip")
    torch.testing.assert_close(run(q, k, v, scale=0.3), scaled_dot_product_attention(q, k, v, scale=0.3))


def test_what_does_not_fit_is_refused() -> None:
    x = torch.randn(1, 3, 5, 8)
    for args, sentence in (
        ((x, x[:, :2], x[:, :2]), "3 query heads cannot share 2 key heads"),
        ((x, x, x[:, :, :4]), "do not fit together"),
        ((x.double(), x.double(), x.double()), "must be float32"),
        ((x[0, 0], x[0, 0], x[0, 0]), "3 or 4 dimensions"),
        ((x, x, x, torch.zeros(5, 4)), "dimension 1 of the mask has 4 entries, 1 or 5 are needed"),
        ((x, x, x, torch.zeros(5, 5, dtype=torch.int32)), "must be bool or float32"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            run(*args)


def test_the_operator_is_a_good_citizen() -> None:
    for args in ((*sample("grouped heads"), None, True, None), (*(torch.randn(3, 9, 8) for _ in range(3)), None, False, 0.5)):
        torch.library.opcheck(
            torch.ops.fxquant.attention, args, test_utils=["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
        )
