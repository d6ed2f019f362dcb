"""Attention on codes against its reference: the same codes, sums, weights and scales on every instruction set.

With ``pv_bits`` 8 and one block of keys the results are bit-equal too; the float path is within 2e-5 max|V| of the reference,
which computes it in float64. Against exact attention: cosine at least 0.998 (qk6) and 0.9995 (qk8) on normal data.
"""

import ctypes
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fxquant.ops
from fxquant.config import ISAS
from fxquant.lowering.cpu.build import load_library
from fxquant.reference import attention as reference
from fxquant.testing.kernels import LEVELS, at_most

assert fxquant.ops.LIBRARY is not None
scaled_dot_product_attention: Any = torch.nn.functional.scaled_dot_product_attention
PARTS = ("q_codes", "k_codes", "q_scales", "k_scales", "sums", "weights")
SCHEMES = [(6, 0), (8, 0), (6, 8), (8, 8)]
FLOAT_TOLERANCE = 2e-5  # of max|V|: scores of some tens in float32, weights by a polynomial
# batch, heads, key heads, queries, keys, head size, head size of the values
SHAPES = {
    "one element": (1, 1, 1, 1, 1, 1, 1),
    "one row": (1, 2, 2, 1, 37, 32, 32),
    "smallest heads": (1, 2, 2, 20, 40, 16, 16),
    "one segment": (1, 3, 3, 50, 60, 64, 64),
    "a segment and a word": (1, 1, 1, 13, 20, 68, 24),
    "ragged everywhere": (1, 4, 4, 197, 131, 33, 33),
    "value heads of another size": (1, 2, 2, 20, 40, 48, 25),
    "shared packing, three heads, two key blocks": (1, 3, 3, 130, 700, 40, 40),
    "grouped heads": (2, 6, 2, 50, 70, 64, 64),
    "blocks across grouped heads": (1, 4, 2, 75, 33, 32, 32),
    "largest head": (1, 1, 1, 9, 30, 256, 256),
    "more queries than keys": (1, 2, 2, 90, 33, 32, 32),
}


@pytest.fixture(autouse=True)
def library() -> None:
    load_library()


def sample(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as views of [B, N, H, d] memory; keys and values have a bias, as those of real models."""
    batch, heads, key_heads, n, m, d, e = SHAPES[name]
    sizes = ((n, heads, d), (m, key_heads, d), (m, key_heads, e))
    q, k, v = (torch.randn(batch, *size).transpose(1, 2) for size in sizes)
    return q, k + 2 * torch.randn(d), v + torch.randn(e)


def trace(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, bits: tuple[int, int], **named: Any) -> Any:
    return torch.ops.fxquant.attention_int_trace(q, k, v, mask, causal, named.get("scale"), *bits)


def run(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, bits: tuple[int, int] = (6, 0)
) -> Tensor:
    out: Tensor = torch.ops.fxquant.attention_int(q, k, v, mask, causal, None, *bits)
    return out


def same(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN where the other is."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def assert_equals_reference(
    q: Tensor, k: Tensor, v: Tensor, bits: tuple[int, int], mask: Tensor | None = None, causal: bool = False
) -> None:
    wanted = reference.attention_int(q, k, v, mask, causal, None, *bits)
    seen = torch.ones(wanted.sums.shape[-2:], dtype=torch.bool)
    seen = seen.tril() if causal else seen
    first = None
    for isa in LEVELS:
        with at_most(isa):
            got, *parts = trace(q, k, v, mask, causal, bits)
            plain = run(q, k, v, mask, causal, bits)
        for name, part in zip(PARTS, parts, strict=True):
            of_pairs = name in ("sums", "weights")
            x, y = ((torch.where(seen, t, 0) if of_pairs else t) for t in (part, getattr(wanted, name)))
            assert same(x, y), f"{ISAS[isa]}: {name}"
        assert same(got, plain), f"{ISAS[isa]}: the trace changes the result"
        assert torch.equal(got.isnan(), wanted.out.isnan()), f"{ISAS[isa]}: NaN"
        largest = float(v.nan_to_num(0, 0, 0).abs().max())
        limit = FLOAT_TOLERANCE if not bits[1] else 0.0 if k.shape[-2] <= reference.KEY_BLOCK else 1e-6
        assert float((got - wanted.out).nan_to_num().abs().max()) <= limit * largest, f"{ISAS[isa]}: values"
        first = got if first is None else first
        assert not bits[1] or same(got, first), f"{ISAS[isa]}: other bits than {ISAS[LEVELS[0]]}"


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("bits", SCHEMES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_it_equals_the_reference(name: str, bits: tuple[int, int], causal: bool) -> None:
    assert_equals_reference(*sample(name), bits, causal=causal)


@pytest.mark.parametrize("bits", SCHEMES, ids=str)
@pytest.mark.parametrize("depth", [1, 3, 4, 16, 31, 32, 33, 63, 64, 65, 68, 96, 128, 129, 200, 256, 1024])
def test_codes_at_their_limits_for_every_number_of_segments(depth: int, bits: tuple[int, int]) -> None:
    """Every product has the largest magnitude, all of one sign: the lanes of a segment end at their bound."""
    signs = torch.where(torch.rand(1, 1, 1, depth) < 0.5, -1.0, 1.0)
    rows = torch.cat([signs, -signs, torch.ones_like(signs), -torch.ones_like(signs)], -2)
    q = rows.repeat(1, 1, 4, 1)  # 16 rows: whole tiles and the rest
    k = torch.cat([q, -q], -2)  # the mean is zero: codes of k are at their limits too
    assert_equals_reference(q, k, torch.randn(1, 1, 32, 8), bits)
    parts = trace(q, k, torch.randn(1, 1, 32, 8), None, False, bits)
    top = 2 ** (bits[0] - 1) - 1
    assert int(parts[1].abs().min()) == int(parts[2].abs().min()) == top
    assert int(parts[5].abs().max()) == top * top * depth


@pytest.mark.parametrize("bits", [6, 8])
def test_too_large_a_head_is_refused(bits: int) -> None:
    x = torch.randn(1, 1, 2, 1025)
    with pytest.raises(RuntimeError, match="a head has 1025 values, at most 1024 have exact sums"):
        run(x, x, x, bits=(bits, 0))
    for wrong in ((7, 0), (6, 6)):
        with pytest.raises(RuntimeError, match="codes of"):
            run(x[..., :8], x[..., :8], x[..., :8], bits=wrong)


def masks(n: int, m: int) -> dict[str, Tensor]:
    seen = torch.rand(n, m) > 0.4
    seen[:, 0] = True
    hidden_row = seen.clone()
    hidden_row[n // 2] = False
    added = torch.randn(n, m)
    lowest = torch.finfo(torch.float32).min
    return {
        "bool, a row hidden": hidden_row,
        "bool, of keys": seen[:1],
        "bool, a batch": seen.expand(2, 1, n, m),
        "added": added,
        "added a head": torch.randn(1, 2, n, m),
        "added, transposed": torch.randn(m, n).t(),
        "-inf, a row hidden": torch.where(hidden_row, added, -math.inf),
        "lowest, a row hidden": torch.where(hidden_row, 0.0, lowest),
        "all hidden": torch.full((n, m), -math.inf),
        "NaN": torch.where(seen, 0.0, math.nan),
        "+inf": torch.where(seen, 0.0, math.inf),
    }


@pytest.mark.parametrize("bits", SCHEMES, ids=str)
@pytest.mark.parametrize("size", [(33, 70), (40, 600)], ids=["one block", "two blocks"])
@pytest.mark.parametrize("kind", masks(1, 1))
def test_masks(kind: str, size: tuple[int, int], bits: tuple[int, int]) -> None:
    n, m = size
    q, k, v = torch.randn(2, 2, n, 24), torch.randn(2, 2, m, 24), torch.randn(2, 2, m, 24)
    mask = masks(n, m)[kind]
    assert_equals_reference(q, k, v, bits, mask)
    wanted = scaled_dot_product_attention(q, k, v, mask)
    got = run(q, k, v, mask, bits=bits)
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal((got == 0).all(-1), (wanted == 0).all(-1))  # hidden rows


@pytest.mark.parametrize("bits", SCHEMES, ids=str)
@pytest.mark.parametrize("isa", LEVELS, ids=lambda isa: str(ISAS[isa]))
def test_a_hidden_row_is_zero_or_uniform(isa: int, bits: tuple[int, int]) -> None:
    q, k, v = torch.randn(1, 1, 30, 8), torch.randn(1, 1, 20, 8), torch.randn(1, 1, 20, 8)
    with at_most(isa):
        assert run(q, k, v, torch.zeros(30, 20, dtype=torch.bool), bits=bits).abs().max() == 0
        uniform = run(q, k, v, torch.full((30, 20), torch.finfo(torch.float32).min), bits=bits)
    torch.testing.assert_close(uniform, v.mean(2, keepdim=True).expand_as(uniform), rtol=0, atol=1e-6 if not bits[1] else 0.02)


@pytest.mark.parametrize("bits", SCHEMES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["q", "k", "v"])
def test_what_is_not_finite_is_not_hidden(place: str, value: float, bits: tuple[int, int]) -> None:
    named = {"q": torch.randn(1, 2, 40, 32), "k": torch.randn(1, 2, 600, 32), "v": torch.randn(1, 2, 600, 32)}
    named[place][0, 1, 0, 3] = value
    q, k, v = named.values()
    if bits[1] or place != "v":
        assert_equals_reference(q, k, v, bits)
    got, wanted = run(q, k, v, bits=bits), scaled_dot_product_attention(q, k, v)
    assert not (got.isfinite() & ~wanted.isfinite()).any()
    assert got[0, 0].isfinite().all()  # the other head
    if place == "q":
        assert got[0, 1, 1:].isfinite().all()
    if place == "v":
        assert torch.equal(got.isfinite(), wanted.isfinite())


@pytest.mark.parametrize("bits", SCHEMES, ids=str)
def test_rows_that_are_zero_tiny_huge_or_overflow(bits: tuple[int, int]) -> None:
    q, k, v = (torch.randn(1, 1, size, 20) for size in (12, 24, 24))
    for x in (q, k, v):
        x[..., 0, :] = 0
        x[..., 1, :] = 1e-41
        x[..., 2, :] = -0.0
    assert_equals_reference(q, k, v, bits)
    assert_equals_reference(q, torch.zeros_like(k), torch.full_like(v, 2.5), bits)
    huge = v * (1e37 if bits[1] else 1.0)  # float sums of such values overflow, as they do in exact attention
    assert_equals_reference(q, torch.full_like(k, 3e38), huge, bits)  # the sum of the keys overflows: no mean
    q[..., 3, :] *= 1e37
    assert_equals_reference(q, k * 1e-30, v, bits)


@pytest.mark.parametrize("bits", SCHEMES, ids=str)
def test_a_constant_of_all_keys_changes_nothing(bits: tuple[int, int]) -> None:
    q, k, v = (torch.randint(-8, 9, (1, 2, 64, 32)).float() for _ in range(3))
    k[..., 32:, :] = -k[..., :32, :]  # a mean of zero, which stays exact when the constant comes
    assert torch.equal(run(q, k + 512.0, v, bits=bits), run(q, k, v, bits=bits))


@pytest.mark.parametrize(("bits", "cosine"), [((6, 0), 0.998), ((8, 0), 0.9995), ((6, 8), 0.998), ((8, 8), 0.9995)], ids=str)
def test_it_is_close_to_exact_attention(bits: tuple[int, int], cosine: float) -> None:
    for size in (32, 64):
        q, k, v = (torch.randn(1, 4, 128, size) for _ in range(3))
        exact = scaled_dot_product_attention(q.double(), k.double(), v.double())
        got = run(q, k + 4 * torch.randn(size), v, bits=bits).double()
        assert float(torch.cosine_similarity(got.flatten(), exact.flatten(), dim=0)) >= cosine


def synthetic() -> tuple[Tensor, Tensor, Tensor]:
    """The tensors of SageAttention-like quantizers' comparison: channels with a bias in q, k and v."""
    i, j = torch.arange(256.0)[:, None], torch.arange(64.0)
    wave = lambda a, b, c: torch.sin(a * i + b * j + c) + 0.3 * torch.cos(0.0037 * a * i * j + c)  # noqa: E731
    q, k, v = wave(0.71, 1.3, 0.2), wave(0.53, 0.9, 1.1), wave(0.37, 0.5, 2.0)
    q[:, 5] += 6
    q[:, 40] -= 4
    k[:, 5] += 8
    k[:, 17] -= 5
    v[:, 3] += 8
    return q[None, None], k[None, None], v[None, None]


def test_the_error_is_the_published_one() -> None:
    """INT8 per token with smooth K: relative L1 error 0.00152 on these tensors; 5 % slack."""
    q, k, v = synthetic()
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(
        exact[0, 0, 0, :4], torch.tensor([-0.115399, -0.166706, -0.210961, 7.755964]).double(), rtol=0, atol=1e-5
    )
    error = lambda bits: float((run(q, k, v, bits=bits) - exact).abs().sum() / exact.abs().sum())  # noqa: E731
    assert error((8, 0)) == pytest.approx(0.00152, rel=0.05)
    assert error((8, 8)) < 0.01
    assert error((6, 0)) < 0.01


@pytest.mark.parametrize("bits", SCHEMES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_any_number_of_threads_gives_the_same_bits(name: str, bits: tuple[int, int]) -> None:
    q, k, v = sample(name)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append([*trace(q, k, v, None, False, bits), *trace(q, k, v, None, True, bits)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_every_layout_gives_the_same_bits() -> None:
    q, k, v = (part.transpose(1, 2) for part in torch.randn(2, 30, 3, 4, 32).unbind(2))
    for bits in SCHEMES:
        wanted = run(q, k, v, bits=bits)
        assert torch.equal(run(q.contiguous(), k.contiguous(), v.contiguous(), bits=bits), wanted)
        assert wanted.transpose(1, 2).is_contiguous()
        flat = run(q.reshape(8, 30, 32), k.reshape(8, 30, 32), v.reshape(8, 30, 32), bits=bits)
        assert torch.equal(flat, wanted.reshape(8, 30, 32))


def test_every_value_is_written() -> None:
    """A tensor freed just before leaves NaN in the memory that the result is likely to take."""
    q, k, v = sample("ragged everywhere")
    for bits in SCHEMES:
        torch.full_like(q.contiguous(), math.nan)
        assert run(q, k, v, bits=bits).isfinite().all()


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 110), m=st.integers(1, 80), d=st.integers(1, 140), e=st.integers(1, 40), seed=st.integers(0, 10**6),
    bits=st.sampled_from(SCHEMES), causal=st.booleans(),
)  # fmt: skip
def test_any_shape(n: int, m: int, d: int, e: int, seed: int, bits: tuple[int, int], causal: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 2, *size, generator=g) for size in ((n, d), (m, d), (m, e)))
    assert_equals_reference(q, k * 10 ** float(torch.randn(1, generator=g)), v, bits, causal=causal)


def test_the_operator_is_a_good_citizen() -> None:
    for shape in (sample("grouped heads"), tuple(torch.randn(3, 9, 8) for _ in range(3))):
        for name in ("attention_int", "attention_int_trace"):
            torch.library.opcheck(
                getattr(torch.ops.fxquant, name),
                (*shape, None, True, None, 6, 8),
                test_utils=["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"],
            )


def test_the_library_exports_the_c_function() -> None:
    assert isinstance(ctypes.CDLL(str(load_library())).fxquant_attention_int, ctypes._CFuncPtr)  # type: ignore[attr-defined]
