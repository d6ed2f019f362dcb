import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxquant
from fxquant.reporting.report import SCHEMA, VERSION


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.LayerNorm(64)).eval()


def run(target: Any, x: torch.Tensor, **options: Any) -> Any:
    compiled = torch.compile(target, backend="fxquant", options={"codegen": "ops", "scheme": "w8a8", **options})
    with torch.no_grad():
        compiled(x)
    return compiled


def test_the_text_accounts_for_every_site() -> None:
    text = str(fxquant.report(run(model(), torch.randn(3, 64), sites={"2": "float"})))
    assert "fxquant: 1 of 2 linears quantized (1 w8a8), 3 sites stay float; 1 graph(s), codegen ops" in text
    for sentence in ("the options ask for float", "norms keep float accuracy", "QUANTIZED", "24 KiB → "):
        assert sentence in text


def test_json_has_a_schema_and_everything() -> None:
    data = json.loads(fxquant.report(run(model(), torch.randn(3, 64))).to_json())
    assert (data["schema"], data["version"]) == (SCHEMA, VERSION)
    (graph,) = data["graphs"]
    assert [site["name"] for site in graph["sites"]] == ["0:linear", "1:gelu", "2:linear", "3:layer_norm"]
    assert graph["sites"][0]["macs"] == 3 * 64 * 96
    assert graph["config"]["scheme"] == "w8a8"
    assert [stage["name"] for stage in graph["stages"]] == ["capture", "recognise", "plan", "quantize", "fuse", "lower"]


def test_layers_that_differ_in_their_numbers_share_a_line() -> None:
    layers = nn.Sequential(*[nn.Linear(64, 64) for _ in range(5)])
    text = str(fxquant.report(run(layers, torch.randn(3, 64), sites={"3": "float"})))
    assert "{0-2,4}:linear" in text


def test_rewrites_are_listed_with_their_equation() -> None:
    linear = nn.Linear(64, 64)
    compiled = run(lambda x: linear(x) * torch.sigmoid(linear(x)), torch.randn(3, 64))
    assert fxquant.report(compiled).unaccounted == ()
    silu = run(lambda x: (y := linear(x)) * torch.sigmoid(y), torch.randn(3, 64))
    assert "x · sigmoid(x)  →  silu(x)" in str(fxquant.report(silu))


def test_explain_leaves_a_compiled_model_alone_and_works_many_times() -> None:
    target, x = model(), torch.randn(3, 64)
    compiled = run(target, x)
    with torch.no_grad():
        before = compiled(x)
        for _ in range(12):
            report = fxquant.explain(compiled, x, options={"scheme": "w7a7"})
            assert [row.scheme for row in report.sites] == ["w7a7", None, "w7a7", None]
        assert torch.equal(compiled(x), before)
    assert fxquant.report(compiled).sites[0].scheme == "w8a8"
    assert report.graphs[0].codegen == "none"


def test_explain_takes_keywords_and_refuses_bad_patterns() -> None:
    assert len(fxquant.explain(model(), input=torch.randn(3, 64)).sites) == 4
    with pytest.raises(Exception, match="matches no site"):
        fxquant.explain(model(), torch.randn(3, 64), options={"sites": {"nothing": "float"}})


def test_there_is_nothing_to_report_on() -> None:
    with pytest.raises(fxquant.ReportError, match="call the compiled model once first"):
        fxquant.report(model())


def test_a_dump_has_a_numbered_file_for_each_stage_that_changed_the_graph(tmp_path: Path) -> None:
    run(model(), torch.randn(3, 64), dump=str(tmp_path))
    (folder,) = tmp_path.iterdir()
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["00-capture.py", "01-quantize.diff", "01-quantize.py", "02-fuse.diff", "02-fuse.py", "record.json"]
    assert "fxquant.fake_quant_per_token" in (folder / "01-quantize.py").read_text()
    assert "+" in (folder / "02-fuse.diff").read_text()
    compile((folder / "02-fuse.py").read_text(), "02-fuse.py", "exec")


def test_the_environment_asks_for_dumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXQUANT_DUMP", str(tmp_path))
    run(model(), torch.randn(3, 64))
    assert len(list(tmp_path.iterdir())) == 1


def test_the_loggers_tell_the_plan_the_passes_and_the_kernels(caplog: pytest.LogCaptureFixture) -> None:
    linear = nn.Linear(64, 64)
    with caplog.at_level("INFO", logger="fxquant"):
        run(lambda x: (y := linear(x)) * torch.sigmoid(y), torch.randn(3, 64))
    messages = {record.name: record.getMessage() for record in caplog.records}
    assert messages["fxquant.plan"].splitlines()[1] == ":linear: w8a8"
    assert messages["fxquant.passes"].startswith("x · sigmoid(x)  →  silu(x) at ")
    assert "kernel library" in messages["fxquant.kernels"]
