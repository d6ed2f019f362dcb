"""Which row-wise work becomes one row program, and that the result stays that of the separate operators."""

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.calibration.calibration import Calibration
from fxquant.calibration.qparams import StaticQParams
from fxquant.calibration.site import SiteCalibration
from fxquant.passes.fuse.rows import BLOCK_ROWS, CACHE_BYTES

F = nn.functional
Function = Callable[..., Any]


def both(function: Function, *args: Tensor, dynamic: bool | None = None) -> list[str]:
    """Runs with and without chains; the titles of what was fused."""
    results = []
    for chains in (True, False):
        torch._dynamo.reset()
        gc.collect()  # a report lists every graph that is alive
        options: Any = {"scheme": "w8a8", "codegen": "ops", "chains": chains}
        compiled = torch.compile(function, backend="fxquant", options=options, dynamic=dynamic)
        with torch.no_grad():
            results.append(compiled(*args))
        report = fxquant.report(compiled)
        rows = [row for graph in report.graphs if graph.config.chains is chains for row in graph.rewrites]
        rows = [row for row in rows if row.rule == "rows"]
        if chains:
            titles = [row.title for row in rows if row.fired]
        else:
            assert rows == []
    for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in results), strict=True):
        assert a.shape == b.shape
        assert (a - b).square().mean() <= 1e-5 * b.square().mean()
    return titles


FC1, FC2, NORM = nn.Linear(32, 64), nn.Linear(64, 32), nn.LayerNorm(32)
GRAPHS: dict[str, tuple[Function, str]] = {
    "pre-norm": (lambda x: x + FC2(F.gelu(FC1(NORM(x)))), "1 layer_norm, 2 linear, 1 gelu, 1 add"),
    "post-norm": (lambda x: NORM(x + FC2(F.gelu(FC1(x), approximate="tanh"))), "2 linear, 1 gelu, 1 add, 1 layer_norm"),
    "swiglu": (lambda x: FC2(F.silu(FC1(x)) * FC1(x)), "3 linear, 1 silu, 1 mul"),
    "two consumers": (lambda x: (FC1(NORM(x)), FC1(NORM(x)).relu()), "2 layer_norm, 2 linear, 1 relu"),
    "views": (lambda x: FC2(FC1(x).view(-1, 64).relu()).view(x.shape), "2 linear, 1 relu"),
    "one input": (lambda x: (FC1(x), FC1(x)), "2 linear"),
}


@pytest.mark.parametrize("name", ["pre-norm", "post-norm", "swiglu", "one input"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_graphs_that_become_one_program(name: str, dynamic: bool | None) -> None:
    function, wanted = GRAPHS[name]
    assert both(function, torch.randn(2, 9, 32), dynamic=dynamic) == [f"{wanted}  →  one row program"]


def test_an_addition_that_broadcasts_stays_outside() -> None:
    titles = both(lambda x, y: FC1(FC2((FC1(x) + y).relu())), torch.randn(2, 9, 32), torch.randn(1, 9, 64))
    assert titles == ["1 relu, 2 linear  →  one row program"]


def test_a_vector_for_every_row_is_taken() -> None:
    titles = both(lambda x, y: FC2(FC1(x) + y), torch.randn(2, 9, 32), torch.randn(64))
    assert titles == ["2 linear, 1 add  →  one row program"]


def test_what_is_written_in_place_stays_outside() -> None:
    def function(x: Tensor) -> Tensor:
        y = FC1(x)
        y.add_(1.0)
        return F.gelu(y)

    assert both(function, torch.randn(3, 32)) == []


def test_a_linear_alone_is_left() -> None:
    assert both(lambda x: FC1(x).exp(), torch.randn(3, 32)) == []


@torch.no_grad()
def test_one_linear_with_its_neighbours_is_left_with_a_sentence() -> None:
    torch._dynamo.reset()
    gc.collect()  # a report lists every graph that is alive
    options: Any = {"scheme": "w8a8", "codegen": "ops", "chains": True}
    compiled: Any = torch.compile(nn.Sequential(NORM, FC1, nn.GELU()), backend="fxquant", options=options)
    compiled(torch.randn(3, 32))
    rows = [row for graph in fxquant.report(compiled).graphs for row in graph.rewrites if row.rule == "rows"]
    assert {row.reason for row in rows} == {"one quantized linear only: there is nothing to keep in cache between two of them"}


@torch.no_grad()
@pytest.mark.parametrize(("rows", "fires"), [(40, False), (32, False), (3, True)])
def test_rows_too_wide_for_the_cache_are_left_with_a_sentence(rows: int, fires: bool) -> None:
    torch._dynamo.reset()
    gc.collect()  # a report lists every graph that is alive
    wide = CACHE_BYTES // BLOCK_ROWS // 4
    model = nn.Sequential(nn.Linear(16, wide), nn.ReLU(), nn.Linear(wide, 16)).eval()
    compiled: Any = torch.compile(model, backend="fxquant", options={"scheme": "w8a8", "codegen": "ops", "chains": True})
    compiled(torch.randn(rows, 16))
    (row,) = [row for graph in fxquant.report(compiled).graphs for row in graph.rewrites if row.rule == "rows"]
    assert row.fired is fires
    assert fires or row.reason == "32 rows of it take 1000 KiB of scratch memory, and 800 KiB stay in a core's cache"


def made_static(site: SiteCalibration) -> SiteCalibration:
    """The site with qparams that count as accurate, whatever is predicted of them."""
    assert isinstance(site.static, StaticQParams)
    return replace(site, static=replace(site.static, noise=0.0, dynamic_noise=0.0))


@pytest.mark.parametrize("scheme", ["w8a8", "w8a7"])
@torch.no_grad()
def test_static_linears_become_part_of_a_program(scheme: str) -> None:
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)).eval()
    x = torch.randn(2, 9, 32)
    found = fxquant.calibrate(model, [x], scheme=scheme)
    calibration = Calibration("minmax", 1, {name: made_static(site) for name, site in found.sites.items()})
    results = []
    for codegen, chains in (("ops", False), ("ops", True), ("inductor", True)):
        torch._dynamo.reset()
        gc.collect()
        options: Any = {"scheme": scheme, "codegen": codegen, "chains": chains, "calibration": calibration}
        compiled = torch.compile(model, backend="fxquant", options=options)
        results.append(compiled(x))
        (graph,) = fxquant.report(compiled).graphs
        assert [row.kernel for row in graph.sites if row.kind == "linear"] == ["linear_static"] * 2
        titles = [row.title for row in graph.rewrites if row.rule == "rows"]
        assert titles == (["1 layer_norm, 2 linear, 1 gelu  →  one row program"] if chains else [])
    assert torch.equal(results[1], results[2])
    assert (results[0] - results[1]).square().mean() <= 1e-5 * results[0].square().mean()
