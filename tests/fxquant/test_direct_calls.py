"""Generated code that calls the library itself gives the bits of the operators: the oracle is ``codegen="ops"``."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.nn.functional import scaled_dot_product_attention as sdpa

from fxquant import ops as operators
from fxquant.lowering.inductor import register

FRESH: dict[str, Any] = {"fx_graph_cache": False}
SCHEMES = ("w8a7", "w2a4", "w4a16-g32", "w8a16", "w4a8-g64", "w4a8")
CPP: dict[str, Any] = {"cpp_wrapper": True, **FRESH}


def through(model: Callable[..., Any], inductor: dict[str, Any], **options: Any) -> Any:
    settings: dict[str, Any] = {"inductor": inductor, **options}
    return torch.compile(model, backend="fxquant", options=settings)


def ops(model: Callable[..., Any], **options: Any) -> Any:
    return torch.compile(model, backend="fxquant", options={"codegen": "ops", **options})


def calls(codes: list[str], name: str) -> bool:
    return any(f"{name}(" in code for code in codes)


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
def test_linears_with_a_fused_epilogue(scheme: str) -> None:
    linear = nn.Linear(96, 72)

    def function(x: Tensor, r: Tensor) -> Tensor:
        return torch.relu(linear(x)) + r

    x, r = torch.randn(9, 96), torch.randn(9, 72)
    got, codes = run_and_get_code(through(function, FRESH, scheme=scheme), x, r)
    assert "torch.ops.fxquant" not in "".join(codes)
    assert "".join(codes).count("async_compile.cpp_pybinding(") == 1  # no second kernel for the epilogue
    assert torch.equal(got, ops(function, scheme=scheme)(x, r))


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
def test_linears_of_any_number_of_rows(scheme: str) -> None:
    linear = nn.Linear(80, 200, bias=scheme != "w4a8")
    fast = torch.compile(linear, backend="fxquant", options={"scheme": scheme}, dynamic=True)
    plain = ops(linear, scheme=scheme)
    for rows in (5, 1, 0, 150):
        x = torch.randn(3, rows, 80).transpose(0, 1)
        assert torch.equal(fast(x), plain(x)), rows


@torch.no_grad()
def test_a_float_linear() -> None:
    register()
    weight, bias, r = torch.randn(300, 96), torch.randn(300), torch.randn(300)
    packed = torch.ops.fxquant.pack_float(weight)
    assert packed.numel() == operators.packed_float_bytes(300, 96)

    def function(x: Tensor) -> Tensor:
        return torch.relu(torch.ops.fxquant.linear_float(x, packed, bias, 300)) + r

    def plain(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.fxquant.linear_float(x, packed, None, 300)
        return y

    for call in (function, plain):
        compiled = torch.compile(call)
        for rows in (7, 1, 140, 0):
            x = torch.randn(rows, 96)
            torch._dynamo.maybe_mark_dynamic(x, 0)
            assert torch.equal(compiled(x), call(x)), rows


class Attention(nn.Module):
    """Attention behind one linear for q, k and v, whose parts are views with offsets."""

    def __init__(self, heads: int, key_heads: int) -> None:
        super().__init__()
        self.heads, self.key_heads = heads, key_heads
        self.qkv = nn.Linear(64, (heads + 2 * key_heads) * 32)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        batch, length, _ = x.shape
        heads = self.qkv(x).view(batch, length, -1, 32).transpose(1, 2)
        q, k, v = heads.split([self.heads, self.key_heads, self.key_heads], dim=1)
        y = sdpa(q, k, v, mask, is_causal=causal, enable_gqa=self.heads != self.key_heads)
        return y.transpose(1, 2).reshape(batch, length, -1)


def masks(batch: int, length: int) -> dict[str, tuple[Tensor | None, bool]]:
    hidden = torch.rand(batch, 1, 1, length) > 0.3
    hidden[..., 0] = True
    return {
        "none": (None, False),
        "causal": (None, True),
        "all true": (torch.ones(batch, 1, 1, length, dtype=torch.bool), False),
        "padding": (hidden, False),
        "expanded": (hidden.expand(batch, 4, length, length), False),
        "strided": ((torch.rand(length, length) > 0.2).t() | torch.eye(length, dtype=torch.bool), False),
        "float": (torch.randn(length, length), False),
        "last key": (torch.arange(length)[None, :] < torch.full((length, 1), length - 1), False),
    }


@torch.no_grad()
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2)])
def test_attention_on_views_with_offsets(heads: int, key_heads: int) -> None:
    model, x = Attention(heads, key_heads), torch.randn(2, 48, 64)
    for name, (mask, causal) in masks(2, 48).items():
        torch._dynamo.reset()
        got, codes = run_and_get_code(through(model, FRESH, scheme="w8a8"), x, mask, causal)
        assert calls(codes, "fxquant_attention_call"), name
        assert torch.equal(got, ops(model, scheme="w8a8")(x, mask, causal)), name


@torch.no_grad()
def test_attention_of_changing_length() -> None:
    model = Attention(4, 4)
    fast = torch.compile(model, backend="fxquant", options={"scheme": "w8a8"}, dynamic=True)
    plain = ops(model, scheme="w8a8")
    for batch, length in ((2, 64), (3, 130), (1, 77)):
        x = torch.randn(batch, length, 64)
        for name, (mask, causal) in masks(batch, length).items():
            if name in ("causal", "padding", "float"):
                assert torch.equal(fast(x, mask, causal), plain(x, mask, causal)), (name, length)


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2])
def test_attention_of_three_dimensions_and_a_scale(threads: int) -> None:
    linear = nn.Linear(40, 40)

    def function(x: Tensor, mask: Tensor) -> Tensor:
        return sdpa(linear(x), x.transpose(1, 2).contiguous().transpose(1, 2), x[..., :24], mask, scale=0.3)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, mask = torch.randn(4, 70, 40), torch.rand(4, 70, 70) > 0.5
        got, codes = run_and_get_code(through(function, FRESH, scheme="w8a8"), x, mask)
        assert calls(codes, "fxquant_attention_call")
        assert torch.equal(got, ops(function, scheme="w8a8")(x, mask))
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_all_layers_share_one_mask() -> None:
    layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(3))

    def function(x: Tensor, padding: Tensor) -> Tensor:
        mask = padding[:, None, None, :] & (torch.arange(64)[:, None] >= 0)
        for layer in layers:
            q = layer(x).view(2, 64, 4, 32).transpose(1, 2)
            x = sdpa(q, q, q, mask.expand(2, 1, 64, 64)).transpose(1, 2).reshape(2, 64, 128)
        return x

    x, padding = torch.randn(2, 64, 128), torch.rand(2, 64) > 0.2
    got, codes = run_and_get_code(through(function, FRESH, scheme="w8a8"), x, padding)
    allocated = [line for line in "".join(codes).splitlines() if "empty_strided_cpu(" in line and "torch.bool" in line]
    assert len(allocated) == 1
    assert torch.equal(got, ops(function, scheme="w8a8")(x, padding))


class Half(nn.Module):
    """What stands between two attentions: four results of one row program."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 136), nn.Linear(136, 64)
        self.q, self.k, self.v = nn.Linear(64, 64), nn.Linear(64, 32), nn.Linear(64, 32)
        self.first, self.second = nn.LayerNorm(64), nn.LayerNorm(64)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        x = self.first(self.out(x) + residual)
        x = self.second(self.down(nn.functional.gelu(self.up(x))) + x)
        return x, self.q(x), self.k(x), self.v(x)


def assert_chained(model: Callable[..., Any], codes: list[str], got: Any, *args: Tensor) -> None:
    """Generated code that calls the row program itself, with the operator's bits."""
    wanted = ops(model, scheme="w8a7", chains=True)(*args)
    assert calls(codes, "fxquant_rows")
    assert "torch.ops.fxquant" not in "".join(codes)
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        assert a.stride() == b.stride()
        assert torch.equal(a, b)


@torch.no_grad()
@pytest.mark.parametrize("settings", [FRESH, CPP], ids=["python", "cpp"])
def test_a_chain_with_several_results(settings: dict[str, Any]) -> None:
    model, args = Half(), (torch.randn(2, 64, 9).transpose(1, 2), torch.randn(2, 9, 64))
    got, codes = run_and_get_code(through(model, settings, scheme="w8a7", chains=True), *args)
    assert_chained(model, codes, got, *args)
    stream = got[0].clone()
    got[1].zero_()  # the results share a buffer, not a byte of it
    assert torch.equal(got[0], stream)


@torch.no_grad()
def test_a_chain_of_changing_length() -> None:
    model = Half()
    fast = torch.compile(model, backend="fxquant", options={"scheme": "w8a7", "chains": True}, dynamic=True)
    plain = ops(model, scheme="w8a7", chains=True)
    for batch, length in ((2, 9), (3, 40), (1, 130), (2, 0)):
        args = torch.randn(batch, length, 64), torch.randn(batch, length, 64)
        for a, b in zip(fast(*args), plain(*args), strict=True):
            assert torch.equal(a, b), (batch, length)


@torch.no_grad()
def test_layers_with_equal_chains_share_one_kernel() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(40, 72), nn.GELU(), nn.Linear(72, 40), nn.Hardtanh()) for _ in range(3)))
    x = torch.randn(2, 5, 40)
    got, codes = run_and_get_code(through(model, FRESH, scheme="w8a7", chains=True), x)
    assert "".join(codes).count("static const int64_t program[]") == 1
    assert torch.equal(got, ops(model, scheme="w8a7", chains=True)(x))


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
def test_cpp_wrapper_gives_the_same_bits(scheme: str) -> None:
    model = Attention(4, 4)
    last = nn.Linear(128, 40)

    def function(x: Tensor, mask: Tensor) -> Tensor:
        return torch.relu(last(model(x, mask))) + 1.0

    x, mask = torch.randn(2, 48, 64), torch.rand(48, 48) > 0.4
    got, codes = run_and_get_code(through(function, CPP, scheme=scheme), x, mask)
    assert calls(codes, "fxquant_attention_call")
    assert "aoti_torch_call_dispatcher" not in "".join(codes)
    assert "torch.ops.fxquant" not in "".join(codes)
    assert torch.equal(got, ops(function, scheme=scheme)(x, mask))
