"""Sites that are no linears: a decider's verdict reaches plan, graph and report, and its failures cost one site only."""

import gc
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import fxquant
from fxquant._compat import FakeTensorMode
from fxquant.config import FxQuantConfig
from fxquant.passes.fuse import FUSIONS
from fxquant.passes.fuse.fusion import Fusion, Verdict
from fxquant.reporting.report import Report

OPTIONS: dict[str, Any] = {"codegen": "ops"}


def takes_all(node: fx.Node, settings: Mapping[str, str], config: FxQuantConfig, isa: str) -> Verdict:
    return Verdict(f"setting {settings['gelu']}", "relu", "REAL")


def becomes_relu(node: fx.Node, verdict: Verdict, fake_mode: FakeTensorMode) -> fx.Node:
    with node.graph.inserting_before(node):
        made = node.graph.call_function(torch.ops.aten.relu.default, (node.args[0],))
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)
    return made


def fails(*args: object) -> Verdict:
    raise ValueError("no luck")


def function(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x)


@torch.no_grad()
def run(fusion: Fusion, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Report]:
    gc.collect()  # what an earlier test compiled
    monkeypatch.setitem(FUSIONS, "gelu", fusion)
    compiled = torch.compile(function, backend="fxquant", options=OPTIONS)
    return compiled(torch.tensor([-1.0, 2.0])), fxquant.report(compiled)


def test_a_verdict_replaces_the_operator_and_stands_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    y, report = run(Fusion(takes_all, becomes_relu), monkeypatch)
    (site,) = report.sites
    assert y.tolist() == [0.0, 2.0]
    assert (site.kernel, site.error_class, site.reason, site.scheme) == ("relu", "REAL", "setting auto", None)
    assert "1 sites stay float (1 of them in kernels of fxquant)" in str(report)


@pytest.mark.parametrize(
    ("fusion", "sentence"),
    [
        (Fusion(fails, becomes_relu), "it cannot be judged: ValueError: no luck"),
        (Fusion(takes_all, fails), "fusing it failed: ValueError: no luck"),  # type: ignore[arg-type]
    ],
)
def test_a_failure_leaves_the_site_as_it_was(fusion: Fusion, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    y, report = run(fusion, monkeypatch)
    (site,) = report.sites
    assert torch.equal(y, function(torch.tensor([-1.0, 2.0])))
    assert (site.kernel, site.error_class, site.reason) == (None, None, sentence)
