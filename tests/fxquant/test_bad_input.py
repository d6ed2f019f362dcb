"""Bad input gets a clear error that names the way out, or a correct float result with a reason."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import _compat, backend
from fxquant.errors import KernelBuildError

X = torch.randn(3, 64)


def run(model: Any, *args: Any, **options: Any) -> Any:
    with torch.no_grad():
        return torch.compile(model, backend="fxquant", options={"codegen": "ops", "scheme": "w8a8", **options})(*args)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shceme": "w8a8"}, "unknown option 'shceme'; did you mean 'scheme'"),
        ({"scheme": "w8a9"}, "unknown scheme 'w8a9': weights have 2 to 8 bits"),
        ({"sites": {"haed": "float"}}, "the pattern 'haed' matches no site; nearest: 'head'"),
    ],
)
def test_a_bad_option_reaches_the_user(options: dict[str, Any], message: str) -> None:
    model = nn.Sequential()
    model.add_module("head", nn.Linear(64, 64))
    with pytest.raises(Exception, match=message):
        run(model, X, **options)


def test_a_bad_environment_variable_and_mode_reach_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad(), pytest.raises(Exception, match="unknown mode 'fast'"):
        torch.compile(nn.Linear(64, 64), backend="fxquant", mode="fast")(X)
    torch._dynamo.reset()
    monkeypatch.setenv("FXQUANT_ISA", "avx3")
    with pytest.raises(Exception, match="FXQUANT_ISA='avx3' is not an instruction set"):
        run(nn.Linear(64, 64), X)


def test_a_pattern_may_match_in_another_part_of_a_broken_graph() -> None:
    model = nn.ModuleDict({"first": nn.Linear(64, 64), "second": nn.Linear(64, 64)})

    def function(x: Tensor) -> Tensor:
        y = model["first"](x)
        torch._dynamo.graph_break()
        return model["second"](y)

    assert run(function, X, sites={"second": "float"}).shape == (3, 64)


class Branches(nn.Module):
    """Two linears, of which each call uses one; ``halt`` breaks the graph before any tensor operation."""

    def __init__(self, halt: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.halt = halt

    def forward(self, x: Tensor, use_first: bool) -> Tensor:
        if self.halt:
            torch._dynamo.graph_break()
        y: Tensor = self.first(x) if use_first else self.second(x)
        return y


def stops_in_a_call(model: Branches) -> Any:
    def call(x: Tensor, use_first: bool) -> Tensor:
        print(end="")  # Dynamo breaks here: the call below becomes a graph of its own
        return model(x, use_first)

    return call


@pytest.mark.parametrize("order", [(True, False), (False, True)])
@pytest.mark.parametrize("make", [lambda m: m, lambda m: lambda x, flag: m(x, flag), stops_in_a_call])
@pytest.mark.parametrize("halt", [False, True])
def test_a_pattern_may_name_a_site_of_another_branch(order: tuple[bool, bool], make: Any, halt: bool) -> None:
    model = Branches(halt)
    options: dict[str, Any] = {"codegen": "ops", "scheme": "w8a8", "sites": {"second": "float"}}
    fast = torch.compile(make(model), backend="fxquant", options=options)
    with torch.no_grad():
        for use_first in order:
            fast(X, use_first)
    assert {row.weight: row.scheme for row in fxquant.report(fast).sites} == {"first.weight": "w8a8", "second.weight": None}


def test_a_pattern_that_no_branch_matches_is_an_error() -> None:
    with pytest.raises(Exception, match="'thrid' matches no site; nearest: 'first'"):
        run(Branches(), X, True, sites={"thrid": "float"})
    torch._dynamo.reset()
    with pytest.raises(Exception, match="'first:softmax' matches no site"):
        run(Branches(), X, True, sites={"first:softmax": "float"})


def test_a_weight_that_is_not_finite() -> None:
    linear = nn.Linear(64, 64)
    with torch.no_grad():
        linear.weight[0, :2] = float("nan")
    got = run(linear, X)
    assert torch.equal(got.isnan(), linear(X).isnan())
    assert (
        fxquant.explain(linear, X, options={"scheme": "w8a8"}).sites[0].reason
        == "the weight holds 2 values that are not finite"
    )


def test_an_empty_batch() -> None:
    linear = nn.Linear(64, 64)
    assert run(linear, torch.empty(0, 64)).shape == (0, 64)
    assert (
        fxquant.explain(linear, torch.empty(0, 64), options={"scheme": "w8a8"}).sites[0].reason == "the batch must not be empty"
    )


def test_integers_and_graphs_with_nothing_to_do() -> None:
    assert torch.equal(run(lambda x: x * 2 + 1, torch.arange(5)), torch.arange(5) * 2 + 1)
    assert run(lambda x: x, X) is X
    assert torch.equal(run(lambda x: x.relu(), X), X.relu())


def test_auto_leaves_small_linears_float() -> None:
    reason = fxquant.explain(nn.Linear(8, 8), torch.randn(2, 8)).sites[0].reason
    assert reason == "auto: 64 weights are too few to win over float (fewer than 32768)"
    assert fxquant.explain(nn.Linear(8, 8), torch.randn(2, 8), options={"scheme": "w8a8"}).sites[0].scheme == "w8a8"


def test_auto_leaves_weights_that_round_badly_float_and_a_scheme_overrides_it() -> None:
    linear, x = nn.Linear(2000, 20), torch.randn(2, 2000)
    assert fxquant.explain(linear, x).sites[0].scheme is not None
    linear.weight.data[3] = 0.0039  # half a step of a channel whose largest weight is 1
    linear.weight.data[3, 0] = 1.0
    reason = fxquant.explain(linear, x).sites[0].reason
    assert reason is not None
    assert reason.startswith("auto: rounding the weight costs too much in its worst channel")
    assert fxquant.explain(linear, x, options={"scheme": "w8a8"}).sites[0].scheme == "w8a8"


def test_another_torch_release_is_refused_unless_asked_to_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compat, "SUPPORTED_TORCH", ("1.0",))
    with pytest.raises(Exception, match=r"is not supported; supported: 1\.0"):
        run(nn.Linear(64, 64), X)
    torch._dynamo.reset()
    assert run(nn.Linear(64, 64), X, try_unsupported_torch=True).shape == (3, 64)


def test_without_the_kernel_library_the_model_stays_float_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KernelBuildError("no C++ compiler found")

    monkeypatch.setattr(backend, "load_library", fail)
    linear = nn.Linear(64, 64)
    with pytest.warns(fxquant.FloatFallbackWarning, match=r"no C\+\+ compiler found"):
        assert torch.equal(run(linear, X), linear(X))


def test_a_stage_that_fails_leaves_the_graph_float(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("broken stage\nwith a second line")

    linear = nn.Linear(64, 64)
    for stage in ("capture", "recognise", "quantize_linear", "fuse_linears"):
        torch._dynamo.reset()
        with monkeypatch.context() as patch:
            patch.setattr(backend, stage, fail)
            with pytest.warns(fxquant.FloatFallbackWarning, match="RuntimeError: broken stage$"):
                assert torch.equal(run(linear, X), linear(X)), stage


def test_a_dump_folder_that_cannot_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.warns(fxquant.FxQuantWarning, match="the dump in .* is given up"):
        assert run(nn.Linear(64, 64), X, dump=str(blocked / "dump")).shape == (3, 64)


def test_no_warning_without_a_reason() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(nn.Linear(64, 64), X)
