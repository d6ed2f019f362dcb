"""Weights are inputs: what the user changes is packed again before the next call, and layers share one graph."""

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import _compat, backend, reference
from fxquant.tracker import tracker

OPS = {"codegen": "ops", "scheme": "w8a8"}


def expected(linear: nn.Linear, x: Tensor) -> Tensor:
    codes, scale = reference.quantize_weight(linear.weight, 8)
    return reference.linear_dynamic(x, codes, scale, linear.bias, 8)


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="fxquant", options={**OPS, **options})


@pytest.mark.parametrize("codegen", ["ops", "inductor"])
def test_every_way_of_changing_a_weight_is_seen(codegen: str) -> None:
    linear, x = nn.Linear(48, 32), torch.randn(3, 48)
    fast = compiled(linear, codegen=codegen)

    def check() -> None:
        with torch.no_grad():
            assert torch.equal(fast(x), expected(linear, x))

    check()
    linear.load_state_dict(nn.Linear(48, 32).state_dict())
    check()
    linear.load_state_dict(nn.Linear(48, 32).state_dict(), assign=True)
    check()
    with torch.no_grad():
        linear.weight.copy_(torch.randn(32, 48))
    check()
    linear.weight.data = torch.randn(32, 48)
    check()
    linear.weight = nn.Parameter(torch.randn(32, 48))
    check()
    optimizer = torch.optim.SGD(linear.parameters(), lr=1.0)
    linear(x).square().sum().backward()
    optimizer.step()
    check()


@torch.no_grad()
def test_refresh_after_writes_that_pytorch_cannot_see() -> None:
    linear, x = nn.Linear(48, 32), torch.randn(3, 48)
    fast = compiled(linear)
    fast(x)
    linear.weight.data.add_(1)
    fxquant.refresh(linear)
    assert torch.equal(fast(x), expected(linear, x))
    linear.weight.detach().numpy()[:] = 0.25
    fxquant.refresh(linear)
    assert torch.equal(fast(x), expected(linear, x))


def test_refresh_after_writes_to_inference_tensors() -> None:
    with torch.inference_mode():
        linear, x = nn.Linear(48, 32), torch.randn(3, 48)
        fast = compiled(linear)
        fast(x)
        linear.weight.mul_(3)
        fxquant.refresh(linear)
        assert torch.equal(fast(x), expected(linear, x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


class TwoLayers(nn.Module):
    """The first output column is that of the second layer, which is quantized; the others are the first layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 48), nn.Linear(48, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x))
        return torch.cat([self.second(hidden.clamp(max=10.0)), hidden[:, 1:]], -1)


@torch.no_grad()
def test_layers_compiled_one_by_one_share_one_graph() -> None:
    layers = [Layer() for _ in range(4)]
    gc.collect()  # graphs of other tests
    before = len(tracker().graphs())
    for layer in layers:
        layer.compile(backend="fxquant", options=OPS)
    x = torch.randn(3, 48)
    for _ in range(2):
        for layer in layers:
            assert torch.equal(layer(x), expected(layer.linear, x))
    assert len(tracker().graphs()) - before == 1
    rows = fxquant.report(nn.ModuleList(layers)).sites
    assert len(rows) == 4
    assert all(row.scheme == "w8a8" for row in rows)


@torch.no_grad()
def test_a_layer_whose_weight_cannot_be_packed_takes_its_own_variant() -> None:
    good, bad = Layer(), Layer()
    bad.linear.weight[0, 0] = float("inf")
    layers = nn.ModuleList([good, bad])
    for layer in layers:
        layer.compile(backend="fxquant", options=OPS)
    x = torch.randn(3, 48)
    assert torch.equal(good(x), expected(good.linear, x))
    assert torch.allclose(bad(x)[:, 1:], bad.linear(x)[:, 1:])
    assert torch.equal(good(x), expected(good.linear, x))
    reasons = {row.reason for row in fxquant.report(layers).sites}
    assert reasons == {None, "the weight holds 1 values that are not finite"}


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(3, 3, 3), (3, 5, 9)])
def test_a_variant_is_compiled_through_inductor_when_it_is_first_called(
    sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_fx, made = _compat.compile_fx, list[Any]()

    def count(*args: Any) -> Any:
        made.append(args[0])
        return compile_fx(*args)

    monkeypatch.setattr(backend, "compile_fx", count)
    good, bad = TwoLayers(), TwoLayers()
    bad.first.weight[0, 0] = float("inf")
    for layer in (good, bad):
        layer.compile(backend="fxquant", options={"scheme": "w8a8"})
    inputs = [torch.randn(rows, 48) for rows in sizes]
    wanted = [good(x) for x in inputs]
    before = len(made)
    for _ in range(2):
        for x in inputs:
            hidden = torch.relu(bad.first(x))
            assert torch.allclose(bad(x)[:, 1:], hidden[:, 1:], atol=1e-5)
            codes, scale = reference.quantize_weight(bad.second.weight, 8)
            column = reference.linear_dynamic(hidden.clamp(max=10.0), codes, scale, bad.second.bias, 8)
            assert torch.allclose(bad(x)[:, :1], column, atol=1e-2)
    assert len(made) > before
    assert all(any("linear_dynamic" in str(n.target) for n in gm.graph.nodes) for gm in made)
    assert all(torch.equal(good(x), y) for x, y in zip(inputs, wanted, strict=True))


@torch.no_grad()
def test_a_variant_that_inductor_cannot_compile_runs_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no code")

    good, bad = Layer(), Layer()
    bad.linear.weight[0, 0] = float("inf")
    for layer in (good, bad):
        layer.compile(backend="fxquant", options={"scheme": "w8a8"})
    x = torch.randn(3, 48)
    good(x)
    monkeypatch.setattr(backend, "compile_fx", fail)
    with pytest.warns(fxquant.FloatFallbackWarning, match="runs without Inductor: RuntimeError: no code"):
        got = bad(x)
    assert torch.allclose(got[:, 1:], bad.linear(x)[:, 1:])
    assert "no code" in str(fxquant.report(bad))


@torch.no_grad()
def test_a_weight_that_becomes_nan_is_float_until_it_is_mended() -> None:
    head = nn.Linear(48, 48)
    model, x = nn.Sequential(head, nn.Linear(48, 32)), torch.randn(3, 48)
    fast = compiled(model)
    first, start = fast(x), head.weight.clone()
    head.weight[3, 3] = float("nan")
    assert torch.equal(fast(x).isnan(), model(x).isnan())
    assert [row.scheme for row in fxquant.report(fast).sites] == [None, "w8a8"]
    head.weight.copy_(start)
    assert torch.equal(fast(x), first)
    assert [row.scheme for row in fxquant.report(fast).sites] == ["w8a8", "w8a8"]


@torch.no_grad()
def test_a_weight_computed_from_parameters_follows_them() -> None:
    linear = nn.Linear(48, 32)
    gain, x = nn.Parameter(torch.tensor(2.0)), torch.randn(3, 48)

    def function(x: Tensor) -> Tensor:
        return nn.functional.linear(x, linear.weight * gain, linear.bias)

    fast = compiled(function)
    for value in (2.0, 5.0):
        gain.fill_(value)
        scaled = copy.deepcopy(linear)
        scaled.weight.mul_(value)
        assert torch.equal(fast(x), expected(scaled, x))


@torch.no_grad()
def test_a_weight_given_as_an_argument_stays_float() -> None:
    x, weight = torch.randn(3, 48), torch.randn(32, 48)
    fast = compiled(nn.functional.linear)
    assert torch.allclose(fast(x, weight), nn.functional.linear(x, weight))
    (row,) = fxquant.report(fast).sites
    assert row.reason == "the weight must be a Parameter or be computed from Parameters alone"


@torch.no_grad()
def test_a_deep_copy_has_its_own_weights() -> None:
    linear, x = nn.Linear(48, 32), torch.randn(3, 48)
    fast = compiled(linear)
    fast(x)
    other = copy.deepcopy(linear)
    other.weight.mul_(2)
    assert torch.equal(compiled(other)(x), expected(other, x))
    assert torch.equal(fast(x), expected(linear, x))


def blobs_alive(size: int) -> int:
    gc.collect()
    tensors = (t for t in gc.get_objects() if type(t) is Tensor and t.dtype == torch.uint8)
    return sum(t.untyped_storage().nbytes() == size for t in tensors)


@torch.no_grad()
@pytest.mark.parametrize("codegen", ["ops", "inductor"])
def test_packed_weights_live_as_long_as_their_parameters(codegen: str) -> None:
    linear, x = nn.Linear(1000, 50), torch.randn(3, 1000)
    fast = compiled(linear, codegen=codegen)
    fast(x)
    size = next(row.bytes_after for row in fxquant.report(fast).sites)
    assert blobs_alive(size) == 1
    for _ in range(3):
        linear.weight.mul_(2)
        fast(x)
    assert blobs_alive(size) == 1
    linear.weight = nn.Parameter(torch.randn(50, 1000))
    fast(x)
    assert blobs_alive(size) == 1
