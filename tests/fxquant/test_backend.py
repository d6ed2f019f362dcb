"""The one line, end to end."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fxquant
from fxquant import reference

OPS: dict[str, Any] = {"codegen": "ops", "scheme": "w8a8"}


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="fxquant", options={**OPS, **options})


def mlp(width: int = 64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)).eval()


def assert_close(got: Tensor, wanted: Tensor, db: float = 30.0) -> None:
    noise = (got.double() - wanted.double()).square().sum()
    assert 10 * torch.log10(wanted.double().square().sum() / noise) >= db


@torch.no_grad()
def test_the_op_equals_the_reference_bit_for_bit_from_both_code_generators() -> None:
    linear, x = nn.Linear(100, 70), torch.randn(3, 11, 100)
    codes, scale = reference.quantize_weight(linear.weight, 8)
    expected = reference.linear_dynamic(x, codes, scale, linear.bias, 8)
    for codegen in ("ops", "inductor"):
        assert torch.equal(compiled(linear, codegen=codegen)(x), expected), codegen


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["auto", "w8a8", "w8a7", "w7a7"])
def test_each_scheme_is_close_to_float(scheme: str) -> None:
    model, x = mlp(256), torch.randn(5, 256)
    assert_close(compiled(model, scheme=scheme)(x), model(x))


@torch.no_grad()
def test_the_default_options_go_through_inductor() -> None:
    model, x = mlp(256), torch.randn(5, 256)
    fast = torch.compile(model, backend="fxquant")
    assert_close(fast(x), model(x))
    assert torch.equal(fast(x), fast(x))
    assert [row.scheme is None for row in fxquant.report(fast).sites] == [False, True, False]


@torch.no_grad()
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("mask", ["none", "padding", "source", "hidden row"])
def test_transformer_encoder_layer(norm_first: bool, mask: str) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first, activation="gelu").eval()
    x, masks = torch.randn(2, 6, 32), {}
    if mask == "padding":
        masks["src_key_padding_mask"] = torch.arange(6)[None] >= torch.tensor([[6], [4]])
    elif mask == "source":
        masks["src_mask"] = torch.ones(6, 6, dtype=torch.bool).triu(1)
    elif mask == "hidden row":
        masks["src_key_padding_mask"] = torch.tensor([[False] * 6, [True] * 6])
    wanted, fast = layer(x, **masks), compiled(layer)
    got = fast(x, **masks)
    assert torch.equal(got.isnan(), wanted.isnan())
    assert_close(got.nan_to_num(), wanted.nan_to_num())
    assert sum(row.scheme == "w8a8" for row in fxquant.report(fast).sites) == 4


@torch.no_grad()
@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention(need_weights: bool) -> None:
    attention, x = nn.MultiheadAttention(32, 4, batch_first=True).eval(), torch.randn(2, 5, 32)
    fast = compiled(lambda q: attention(q, q, q, need_weights=need_weights)[0])
    assert_close(fast(x), attention(x, x, x)[0])
    assert all(row.scheme == "w8a8" for row in fxquant.report(fast).sites if row.kind == "linear")


@torch.no_grad()
def test_a_plain_function_with_weights_in_its_closure() -> None:
    weight, x = nn.Parameter(torch.randn(48, 64)), torch.randn(5, 64)

    def function(x: Tensor) -> Tensor:
        return F.relu(x @ weight.t())

    fast = compiled(function)
    assert_close(fast(x), function(x))
    assert [row.scheme for row in fxquant.report(fast).sites] == ["w8a8"]


def test_with_gradients_the_graph_stays_float_and_differentiable() -> None:
    model, x = mlp(), torch.randn(5, 64)
    fast = compiled(model)
    with pytest.warns(fxquant.GradModeWarning, match=r"torch\.no_grad\(\).*assume_inference=True"):
        got = fast(x)
    assert torch.equal(got, model(x))
    got.sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model(x).sum().backward()
    assert len(grads) == 4
    assert all(torch.allclose(a, p.grad) for a, p in zip(grads, model.parameters(), strict=True) if p.grad is not None)
    record = fxquant.report(fast).graphs[0]
    assert record.mode == "training"
    assert "gradients are enabled" in record.notes[0]


def test_assume_inference_quantizes_with_gradients_enabled() -> None:
    model, x = mlp(), torch.randn(5, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = compiled(model, assume_inference=True)(x)
    assert not got.requires_grad
    assert_close(got, model(x))
    assert not torch.equal(got, model(x))


def test_inference_mode_and_no_grad_are_both_quantized() -> None:
    model, x = mlp(), torch.randn(5, 64)
    fast = compiled(model)
    with torch.no_grad():
        first = fast(x)
    with torch.inference_mode():
        assert torch.equal(fast(x), first)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_keep_their_dtype(dtype: torch.dtype) -> None:
    model, x = mlp().to(dtype), torch.randn(5, 64, dtype=dtype)
    fast = compiled(model)
    assert fast(x).dtype == dtype
    assert_close(fast(x), model(x), 25)


@torch.no_grad()
@pytest.mark.parametrize("codegen", ["ops", "inductor"])
def test_autocast_around_and_inside_gives_the_dtype_of_eager(codegen: str) -> None:
    model, x = mlp(), torch.randn(5, 64)

    def inside(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y: Tensor = model(x)
        return y * 2

    fast, fast_inside = compiled(model, codegen=codegen), compiled(inside, codegen=codegen)
    with torch.autocast("cpu", torch.bfloat16):
        got, wanted = fast(x), model(x)
    assert got.dtype == wanted.dtype == torch.bfloat16
    assert_close(got, wanted, 25)
    assert fast_inside(x).dtype == inside(x).dtype
    assert_close(fast_inside(x), inside(x), 25)


@torch.no_grad()
def test_float64_stays_float_with_a_reason() -> None:
    model, x = mlp().double(), torch.randn(5, 64, dtype=torch.float64)
    fast = compiled(model)
    assert torch.equal(fast(x), model(x))
    reasons = {row.reason for row in fxquant.report(fast).sites if row.kind == "linear"}
    assert reasons == {"input and weight must be float32, bfloat16 or float16"}


@torch.no_grad()
def test_a_module_called_twice_has_two_sites_and_one_packed_weight() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(torch.relu(self.shared(x)))

    model, x = Twice().eval(), torch.randn(3, 64)
    fast = compiled(model)
    assert_close(fast(x), model(x))
    rows = fxquant.report(fast).sites
    assert [row.name for row in rows] == ["shared:linear", "shared:linear#2"]
    assert sum(row.bytes_after > 0 for row in rows) == 1


@torch.no_grad()
def test_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(80, 64)
            self.head = nn.Linear(64, 80, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            y: Tensor = self.head(self.embed(ids))
            return y

    model, ids = Tied().eval(), torch.randint(0, 80, (2, 5))
    fast = compiled(model)
    assert_close(fast(ids), model(ids))
    assert {row.kind: row.scheme for row in fxquant.report(fast).sites} == {"embedding": None, "linear": "w8a8"}


@torch.no_grad()
def test_a_weight_that_the_graph_writes_is_no_constant() -> None:
    linear, x = nn.Linear(64, 64), torch.randn(3, 64)

    def grow(x: Tensor) -> Tensor:
        linear.weight.add_(0.5)
        y: Tensor = linear(x)
        return y

    fast, start = compiled(grow), linear.weight.clone()
    got = fast(x)
    linear.weight.copy_(start)
    assert torch.allclose(got, grow(x), atol=1e-5)


@torch.no_grad()
def test_in_place_operators() -> None:
    model = mlp()

    def function(x: Tensor) -> Tensor:
        x.mul_(2)
        y = model[0](x)
        y.relu_().add_(1)
        return model[2](y)

    a, b = torch.randn(5, 64), torch.zeros(0)
    b = a.clone()
    got, wanted = compiled(function)(a), function(b)
    assert torch.equal(a, b)
    assert_close(got, wanted)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@torch.no_grad()
@pytest.mark.parametrize("kind", ["cond", "checkpoint", "autograd.Function", "vmap", "literal", "nested no_grad"])
@pytest.mark.parametrize("codegen", ["ops", "inductor"])
def test_higher_order_operators_and_odd_graphs(kind: str, codegen: str) -> None:
    model = mlp()

    def function(x: Tensor) -> Tensor:
        y: Tensor = model(x)
        if kind == "cond":
            return torch.cond(y.sum() > 0, lambda v: v * 2, lambda v: v - 1, (y,))
        if kind == "checkpoint":
            return checkpoint(lambda v: model[2](model[1](model[0](v))), y, use_reentrant=False)
        if kind == "autograd.Function":
            return Square.apply(y)
        if kind == "vmap":
            return torch.vmap(lambda row: row * row.sum())(y)
        if kind == "literal":
            return y * torch.tensor([2.0])
        with torch.no_grad():
            return y.exp()

    x = torch.randn(5, 64)
    fast = compiled(function, codegen=codegen)
    assert_close(fast(x), function(x), 25)
    assert fxquant.report(fast).unaccounted == ()


@torch.no_grad()
def test_graph_breaks_leave_every_part_quantized() -> None:
    model = mlp()

    def function(x: Tensor) -> Tensor:
        y = model[0](x)
        torch._dynamo.graph_break()
        return model[2](torch.tanh(y))

    fast, x = compiled(function), torch.randn(5, 64)
    assert_close(fast(x), function(x))


@torch.no_grad()
def test_fullgraph_and_mode() -> None:
    model, x = mlp(), torch.randn(5, 64)
    assert_close(torch.compile(model, backend="fxquant", fullgraph=True, options=OPS)(x), model(x))
    torch._dynamo.reset()
    assert_close(torch.compile(model, backend="fxquant", mode="reduce-overhead")(x), model(x))


@torch.no_grad()
def test_two_thread_counts_give_the_same_bits() -> None:
    model, x, before = mlp(), torch.randn(37, 64), torch.get_num_threads()
    fast = compiled(model[0])
    try:
        torch.set_num_threads(1)
        one = fast(x)
        torch.set_num_threads(2)
        assert torch.equal(one, fast(x))
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_two_configs_in_one_process() -> None:
    linear, x = nn.Linear(64, 64), torch.randn(3, 64)
    a, b = compiled(linear, scheme="w8a8"), compiled(linear, scheme="w7a7")
    assert not torch.equal(a(x), b(x))
    assert torch.equal(a(x), a(x))
