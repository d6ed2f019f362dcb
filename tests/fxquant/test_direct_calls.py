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
