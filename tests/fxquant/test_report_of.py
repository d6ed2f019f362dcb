"""Which graphs belong to a module or a function, and what the report lists while gradients are enabled."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import backend

X = torch.linspace(-1, 1, 192).reshape(3, 64)


def compiled(target: Any, **options: Any) -> Any:
    return torch.compile(target, backend="fxquant", options={"codegen": "ops", "scheme": "w8a8", **options})


def weights(target: Any) -> list[tuple[str | None, float | None]]:
    return [(row.scheme, row.weight_sqnr_db) for graph in fxquant.report(target).graphs for row in graph.sites]


def caller_of(model: Any) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        y: Tensor = model(x)
        return y.relu()

    return call


def broken_caller_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        y = model(x)
        torch._dynamo.graph_break()
        return torch.softmax(y, -1)

    return call


class Holder:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def method(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x)
        return y

    def __call__(self, x: Tensor) -> Tensor:
        return self.method(x)


@torch.no_grad()
@pytest.mark.parametrize(
    "make",
    [
        caller_of,
        broken_caller_of,
        lambda model: Holder(model).method,
        lambda model: caller_of(Holder(model)),
        lambda model: caller_of(functools.partial(model)),
        lambda model: caller_of(caller_of(model)),
    ],
)
@pytest.mark.parametrize("scheme", ["w8a8", "float"])
def test_functions_of_one_code_are_told_apart_by_their_weights(make: Any, scheme: str) -> None:
    first, second = nn.Linear(64, 64), nn.Linear(64, 64)
    fast = [compiled(make(model), scheme=scheme) for model in (first, second)]
    for function in fast:
        function(X)
    sites = [sum(site.kind == "linear" for site in fxquant.report(function).sites) for function in fast]
    assert sites == [1, 1]
    if scheme == "w8a8":
        alone = [[row for row in weights(compiled_alone(model)) if row[0]] for model in (first, second)]
        assert [[row for row in weights(function) if row[0]] for function in fast] == alone


def compiled_alone(model: nn.Module) -> Any:
    fast = compiled(copy.deepcopy(model))
    fast(X)
    return fast


@torch.no_grad()
def test_functions_of_one_code_with_unlike_modules() -> None:
    first, second = compiled(caller_of(nn.Linear(64, 64))), compiled(caller_of(nn.Sequential(nn.Linear(64, 32), nn.GELU())))
    first(X), second(X)
    assert [row.kind for row in fxquant.report(first).sites] == ["linear"]
    assert [row.kind for row in fxquant.report(second).sites] == ["linear", "gelu"]


@torch.no_grad()
def test_a_function_that_is_gone_while_its_module_lives() -> None:
    for model in (models := [nn.Linear(64, 64), nn.Linear(64, 64)]):
        fast = compiled(caller_of(model))
        fast(X)
        assert len(fxquant.report(fast).sites) == 1, models


@torch.no_grad()
def test_callable_objects_and_partials() -> None:
    first, second, third = (Holder(nn.Linear(64, 64)) for _ in range(3))
    for target in (first, second, functools.partial(third.method)):
        fast = compiled(target)
        fast(X)
        assert [row.scheme for row in fxquant.report(fast).sites] == ["w8a8"]


@torch.no_grad()
def test_a_weight_that_no_function_holds_is_shown() -> None:
    layers = {"only": nn.Linear(64, 64)}
    fast = compiled(lambda x, held: held["only"](x))
    fast(X, layers)
    assert [row.scheme for row in fxquant.report(fast).sites] == ["w8a8"]


def breaks_inside(x: Tensor) -> Tensor:
    y = torch.softmax(x, -1)
    torch._dynamo.graph_break()
    return nn.functional.silu(y)


@torch.no_grad()
def test_what_follows_a_graph_break_in_a_function_without_weights() -> None:
    def function(x: Tensor) -> Tensor:
        y = nn.functional.gelu(x)
        torch._dynamo.graph_break()
        y = torch.softmax(y, -1)
        torch._dynamo.graph_break()
        return nn.functional.layer_norm(y, [64])

    def other(x: Tensor) -> Tensor:
        return breaks_inside(nn.functional.gelu(x))

    first, second = compiled(function), compiled(other)
    first(X), second(X)
    assert [row.kind for row in fxquant.report(first).sites] == ["gelu", "softmax", "layer_norm"]
    assert [row.kind for row in fxquant.report(second).sites] == ["gelu", "softmax", "silu"]


@torch.no_grad()
def test_layers_that_share_a_float_graph_each_have_a_report() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(x)
            return y

    layers = [Layer(), Layer()]
    for layer in layers:
        layer.compile(backend="fxquant", options={"codegen": "ops", "scheme": "float"})
        layer(X)
    assert [row.reason for layer in layers for row in fxquant.report(layer).sites] == ["the options ask for float"] * 2
    assert len(fxquant.report(nn.ModuleList(layers)).sites) == 2


@pytest.mark.parametrize("codegen", ["ops", "inductor"])
def test_with_gradients_every_site_is_listed_with_the_reason(codegen: str) -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.LayerNorm(64))
    fast = compiled(model, codegen=codegen)
    with pytest.warns(fxquant.GradModeWarning):
        got = fast(X)
    got.sum().backward()
    assert model[0].weight.grad is not None
    report = fxquant.report(fast)
    assert [row.name for row in report.sites] == ["0:linear", "1:gelu", "2:linear", "3:layer_norm"]
    assert {str(row.reason).partition(",")[0] for row in report.sites} == {"gradients are enabled"}
    assert report.unaccounted == ()


def test_a_graph_that_cannot_be_listed_still_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("broken")

    for stage in ("capture", "recognise", "float_plan"):
        torch._dynamo.reset()
        model = nn.Linear(64, 64)
        fast = compiled(model)
        with monkeypatch.context() as patch:
            patch.setattr(backend, stage, fail)
            with pytest.warns(fxquant.GradModeWarning):
                got = fast(X)
        got.sum().backward()
        assert model.weight.grad is not None
        notes = fxquant.report(fast).graphs[0].notes
        assert any("not listed" in note and "broken" in note for note in notes)


def test_data_dependent_shapes_still_train() -> None:
    model = nn.Linear(64, 64)

    def function(x: Tensor) -> Tensor:
        y: Tensor = model(x)
        return y[y > 0].sum()

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), pytest.warns(fxquant.GradModeWarning):
        got = compiled(function, codegen="inductor")(X)
    assert torch.allclose(got, function(X), atol=1e-4)


class Sigmoid(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.sigmoid(q @ k.transpose(-1, -2) * 0.25 - 2.0) @ v


@torch.no_grad()
def test_a_module_without_parameters_is_known_by_its_code() -> None:
    module = Sigmoid()
    call = compiled(module)
    call(*torch.randn(3, 1, 2, 8, 16))
    for target in (call, module):
        assert [row.kind for graph in fxquant.report(target).graphs for row in graph.sites] == ["sigmoid_attention"]


@torch.no_grad()
@pytest.mark.parametrize("make", [lambda model: model, caller_of])
def test_compiling_again_with_other_options_replaces_the_former_graphs(make: Any) -> None:
    target = make(nn.Sequential(nn.Linear(64, 64), nn.GELU()))
    first = compiled(target, scheme="w8a8")
    second = compiled(target, scheme="w6a6")
    first(X), second(X)
    for each in (first, second, target):
        report = fxquant.report(each)
        assert [row.scheme for row in report.sites if row.kind == "linear"] == ["w6a6"]
        assert {graph.config.scheme for graph in report.graphs} == {"w6a6"}


@torch.no_grad()
def test_layers_of_one_code_with_options_of_their_own_are_all_shown() -> None:
    layers = [nn.Linear(64, 64) for _ in range(2)]
    fast = [compiled(layer, scheme=scheme) for layer, scheme in zip(layers, ("w8a8", "w6a6"), strict=True)]

    def both(x: Tensor) -> Tensor:
        y: Tensor = fast[0](x) + fast[1](x)
        return y

    both(X)
    for target in (nn.ModuleList(layers), both):
        assert sorted(str(row.scheme) for graph in fxquant.report(target).graphs for row in graph.sites) == ["w6a6", "w8a8"]
