"""The accuracy suite: disjoint data, exact scores, rows that outlive a stop, and a table that says what was measured."""

import importlib
import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

ROOT = Path(__file__).parents[1]
MODULES = ("data", "memory", "minilm_sentences", "rows", "smollm", "subject", "suite", "tables", "vision")


@pytest.fixture(scope="module")
def accuracy() -> Iterator[Namespace]:
    """The modules of benchmarks/accuracy by name, imported as its command imports them."""
    with pytest.MonkeyPatch.context() as patch:
        for folder in ("benchmarks", "examples"):
            patch.syspath_prepend(str(ROOT / folder))
        before = set(sys.modules)
        yield Namespace(**{name: importlib.import_module(f"accuracy.{name}") for name in MODULES})
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("accuracy", "models", "cpuid", "vit_small", "vit_base", "train_fashion_vit"):
                del sys.modules[name]


class Tiny:
    """A random model of two linears, scored by its distance to float; what a subject is, in milliseconds."""

    name = "tiny"
    title = "Tiny"
    protocol = "random numbers"
    damage = ("error", "relative error", float)
    options: dict[str, Any] = {}  # noqa: RUF012 - nobody writes to it

    def __init__(self, accuracy: Namespace) -> None:
        column = accuracy.subject.Column
        self.columns = (column("error", "relative error"), column("ratio", "over float", ".2f", ratio_of="size"))
        self.loaded = 0

    def load(self) -> nn.Module:
        self.loaded += 1
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(32, 48), nn.Sigmoid(), nn.Linear(48, 8)).eval()

    def batches(self, seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        yield from torch.rand(4, 16, 32, generator=generator)  # of one range in every token: static codes are accurate

    def _input(self) -> Tensor:
        return torch.rand(16, 32, generator=torch.Generator().manual_seed(99))

    def reference(self, model: nn.Module) -> Tensor:
        exact: Tensor = model(self._input())
        return exact

    def score(self, call: Callable[..., Any], reference: Tensor) -> dict[str, float]:
        got = call(self._input())
        return {"error": float((got - reference).norm() / reference.norm()), "size": float(got.norm())}

    def takes(self, scheme: str) -> bool:
        return True


def options(accuracy: Namespace, *arguments: str) -> Namespace:
    parsed: Namespace = accuracy.suite.parse(arguments, ["tiny"])
    return parsed


def test_every_cell_is_measured_and_said_so(accuracy: Namespace, tmp_path: Path) -> None:
    tiny, path = Tiny(accuracy), tmp_path / "rows.jsonl"
    given = options(accuracy, "--schemes", "w8a8", "w4a4", "--methods", "dynamic", "minmax", "--seeds", "0", "1")
    accuracy.suite.measure([tiny], given, path)
    rows = accuracy.rows.read(path)
    error = {(cell.scheme, cell.method, cell.seed): row.scores["error"] for cell, row in rows.items()}
    assert len(error) == 1 + 2 * (1 + 2)
    assert error["float32", "", 0] == 0
    assert 0 < error["w8a8", "dynamic", 0] < 0.05 < error["w4a4", "dynamic", 0] < 1
    assert error["w8a8", "minmax", 0] != error["w8a8", "minmax", 1]  # other calibration data
    linears = {cell: row.linears for cell, row in rows.items()}
    assert linears[accuracy.rows.Cell("tiny", "w8a8", "minmax", 0)] == {"w8a8 static": 2}
    assert linears[accuracy.rows.Cell("tiny", "w8a8", "dynamic", 0)] == {"w8a8": 2}


def test_what_is_in_the_file_is_not_measured_again(accuracy: Namespace, tmp_path: Path) -> None:
    tiny, path = Tiny(accuracy), tmp_path / "rows.jsonl"
    accuracy.suite.measure([tiny], options(accuracy, "--schemes", "w8a8", "--methods", "dynamic"), path)
    whole = path.read_bytes()
    accuracy.suite.measure([tiny], options(accuracy, "--schemes", "w8a8", "--methods", "dynamic"), path)
    assert path.read_bytes() == whole
    assert tiny.loaded == 1
    accuracy.suite.measure([tiny], options(accuracy, "--schemes", "w8a8", "w6a6", "--methods", "dynamic"), path)
    assert [json.loads(line)["cell"]["scheme"] for line in path.read_text().splitlines()] == ["float32", "w8a8", "w6a6"]
    tiny.protocol = "other random numbers"
    accuracy.suite.measure([tiny], options(accuracy, "--schemes", "w8a8", "--methods", "dynamic"), path)
    assert len(path.read_text().splitlines()) == 5


def test_rows_by_another_protocol_are_not_on_the_page(accuracy: Namespace, tmp_path: Path) -> None:
    tiny, path = Tiny(accuracy), tmp_path / "rows.jsonl"
    accuracy.suite.measure([tiny], options(accuracy, "--schemes", "w8a8", "--methods", "dynamic"), path)
    assert "| w8a8 | dynamic |" in accuracy.tables.publish([tiny], accuracy.rows.read(path), tmp_path)
    tiny.protocol = "other random numbers"
    assert "| w8a8 | dynamic |" not in accuracy.tables.publish([tiny], accuracy.rows.read(path), tmp_path)


def test_a_run_that_was_killed_while_it_wrote_loses_that_row_alone(accuracy: Namespace, tmp_path: Path) -> None:
    tiny, path = Tiny(accuracy), tmp_path / "rows.jsonl"
    given = options(accuracy, "--schemes", "w8a8", "--methods", "dynamic")
    accuracy.suite.measure([tiny], given, path)
    path.write_bytes(path.read_bytes()[:-20])
    assert [cell.scheme for cell in accuracy.rows.read(path)] == ["float32"]
    accuracy.suite.measure([tiny], given, path)
    assert [cell.scheme for cell in accuracy.rows.read(path)] == ["float32", "w8a8"]


def test_a_model_that_is_not_installed_is_left_out(
    accuracy: Namespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing, tiny = Tiny(accuracy), Tiny(accuracy)
    missing.name = "missing"

    def load() -> nn.Module:
        raise FileNotFoundError("weights are missing: install them")

    missing.load = load  # type: ignore[method-assign]
    given = options(accuracy, "--schemes", "w8a8", "--methods", "dynamic")
    accuracy.suite.measure([missing, tiny], given, tmp_path / "rows.jsonl")
    assert "left out: missing: weights are missing: install them" in capsys.readouterr().err
    assert {cell.model for cell in accuracy.rows.read(tmp_path / "rows.jsonl")} == {"tiny"}


def test_a_cell_that_fails_is_named_and_the_next_one_measured(
    accuracy: Namespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = options(accuracy, "--schemes", "w99a8", "w8a8", "--methods", "dynamic")
    accuracy.suite.measure([Tiny(accuracy)], given, tmp_path / "rows.jsonl")
    assert "no row: tiny: w99a8 dynamic" in capsys.readouterr().err
    assert [cell.scheme for cell in accuracy.rows.read(tmp_path / "rows.jsonl")] == ["float32", "w8a8"]


def test_ranges_of_activations_mean_nothing_to_weight_only_schemes(accuracy: Namespace) -> None:
    cells = list(accuracy.suite.cells(Tiny(accuracy), ["w4a16-g128", "w8a8"], ["dynamic", "minmax"], [0, 1]))
    assert [(c.scheme, c.method, c.seed) for c in cells] == [
        ("float32", "", 0),
        ("w4a16-g128", "dynamic", 0),
        ("w8a8", "dynamic", 0),
        ("w8a8", "minmax", 0),
        ("w8a8", "minmax", 1),
    ]


def test_the_table_has_ratios_to_float_and_the_spread_over_seeds(accuracy: Namespace) -> None:
    row, cell = accuracy.rows.Row, accuracy.rows.Cell
    rows = [
        row(
            cell("tiny", "w4a4", "minmax", seed),
            "",
            {"error": 0.1 + seed / 10, "size": 6.0},
            {"w4a4 static": 1, "float": 1},
            {},
            "",
        )
        for seed in (0, 1)
    ]
    exact = row(cell("tiny", "float32", "", 0), "", {"error": 0.0, "size": 4.0}, {}, {}, "")
    lines = accuracy.tables.section(Tiny(accuracy), [*rows, exact]).splitlines()
    assert lines[-2] == "| float32 |  |  |  |  | 0.0000 | 1.00 |"
    assert lines[-1] == "| w4a4 | minmax | 2 | 1 of 2 | 1 | 0.1500 ± 0.0707 | 1.50 ± 0.00 |"
    without_float = accuracy.tables.section(Tiny(accuracy), rows).splitlines()
    assert without_float[-1].endswith("| 0.1500 ± 0.0707 |  |")


def test_one_command_writes_rows_page_and_plot(accuracy: Namespace, tmp_path: Path) -> None:
    arguments = ["--schemes", "w8a8", "--out", str(tmp_path)]
    accuracy.suite.main(arguments, {"tiny": lambda: Tiny(accuracy)})
    page = (tmp_path / "README.md").read_text()
    assert "## Tiny\n\nrandom numbers\n" in page
    assert "| w8a8 | minmax | 1 | 2 of 2 | 2 |" in page
    plot = (tmp_path / "tiny.svg").read_bytes()
    assert b"relative error" in plot or b"<svg" in plot
    accuracy.suite.main(arguments, {"tiny": lambda: Tiny(accuracy)})
    assert (tmp_path / "tiny.svg").read_bytes() == plot
    assert (tmp_path / "README.md").read_text() == page


def test_an_item_has_one_use(accuracy: Namespace) -> None:
    split = accuracy.data.disjoint(["a", "b", " C", "d"], scored=["c"], fitted=["d", "C "])
    assert (split.calibration, split.fitted, split.scored) == (["a", "b"], ["d"], ["c"])
    picture = torch.ones(1, 2, 2)
    split = accuracy.data.disjoint([(picture, 3), (picture + 1, 3)], scored=[(picture.clone(), 4)])
    assert [float(x.amax()) for x, _ in split.calibration] == [2.0]


@pytest.mark.parametrize("name", ["minilm", "smollm2", "vit-s", "fashion-vit"])
def test_calibration_data_are_never_scored(accuracy: Namespace, name: str) -> None:
    try:
        split = accuracy.suite.every_subject()[name]().split()
    except (FileNotFoundError, ImportError) as error:
        pytest.skip(str(error))
    uses = [{accuracy.data.digest(item) for item in use} for use in (split.calibration, split.fitted, split.scored)]
    assert uses[0]
    assert uses[2]
    assert len(uses[0] | uses[1] | uses[2]) == sum(map(len, uses))


def test_a_perturbed_weight_moves_by_at_most_half_a_step(accuracy: Namespace) -> None:
    weight = torch.randn(5, 64)
    moved = weight.clone()
    accuracy.smollm.perturb(moved, torch.Generator().manual_seed(0))
    groups = weight.unflatten(1, (-1, 32))
    step = (groups.amax(-1) - groups.amin(-1))[..., None] / 15
    steps = (moved - weight).unflatten(1, (-1, 32)) / step
    assert 0.45 < float(steps.abs().amax()) <= 0.5 + 1e-5
    assert abs(float(steps.mean())) < 0.1


def test_divergence_correlation_and_retrieval(accuracy: Namespace) -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    assert float(accuracy.smollm.kl(logits, logits)) == 0
    certain = torch.tensor([[50.0, -50.0]])
    assert abs(float(accuracy.smollm.kl(torch.zeros(1, 2), certain)) - 0.6931472) < 1e-6
    x = torch.tensor([[1.0, 2.0, 4.0]])
    assert torch.allclose(accuracy.vision.correlation(3 * x + 1, x), torch.ones(1))
    assert torch.allclose(accuracy.vision.correlation(-x, x), -torch.ones(1))
    documents = one_hot(torch.arange(12)).float()
    queries = documents[:2].clone()
    queries[1, 2] = 2.0  # nearer to another definition than to its own
    found = accuracy.minilm_sentences.retrieval(queries, documents)
    assert found == {"recall@1": 0.5, "recall@10": 1.0, "mrr": 0.75}


def test_heatmaps_equal_those_of_the_onnx_file(accuracy: Namespace) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("sklearn")
    subject = accuracy.vision.ViTSmall()
    try:
        model = subject.load()
    except (FileNotFoundError, ImportError) as error:
        pytest.skip(str(error))
    pixels = sys.modules["vit_small"].squares(sys.modules["vit_small"].photographs()[0], 1, 0)["pixel_values"]
    session = runtime.InferenceSession(str(accuracy.vision.ONNX), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"input_image": pixels.numpy()})
    with torch.no_grad():
        heatmap = subject._heatmaps(model(pixels)[0])
    assert torch.allclose(heatmap, torch.from_numpy(expected).flatten(1), atol=1e-4)


def test_the_peak_of_memory_is_that_of_its_block(accuracy: Namespace) -> None:
    with accuracy.memory.Peak() as peak:
        held = torch.ones(256 * 2**20 // 4)
        time.sleep(0.1)
        inside = accuracy.memory.held_mib()
        del held
    assert abs(peak.mib - inside) < 8
    with accuracy.memory.Peak() as later:
        pass
    assert later.mib < peak.mib - 200
