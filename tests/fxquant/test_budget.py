"""Budgets: what they measure, how bits are allocated, and that a plan keeps its budget on data it never saw."""

from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import Budget, CalibrationError, ConfigError
from fxquant.calibration.allocation import allocate, curve
from fxquant.calibration.ranking import looser, outlier_score
from fxquant.calibration.sensitivity import Probe
from fxquant.reporting.plots import plot_budget


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
    probes = {
        str(i): [Probe(str(i), f"w{bits}", error, size * bits) for bits, error in zip((2, 4, 8), row, strict=True)]
        for i, (size, row) in enumerate(zip((4, 1, 2), errors, strict=True))
    }
    found = allocate(probes, 2.2 + 1e-9)
    assert (list(found.schemes.values()), found.us) == (["w4", "w4", "w4"], 28)
    assert found.error == pytest.approx(2.2)
    found = allocate(probes, 1.801 + 1e-9)
    assert list(found.schemes.values()) == ["w4", "w8", "w4"]
    assert found.error == pytest.approx(1.801)


def test_an_allocation_never_passes_the_limit_and_the_curve_is_one() -> None:
    torch.manual_seed(0)
    for _ in range(20):
        probes = {
            str(i): [Probe(str(i), "float", 0.0, 10.0)]
            + [Probe(str(i), f"w{b}", float(torch.rand(())), float(torch.rand(()) * 10)) for b in range(3)]
            for i in range(6)
        }
        for limit in (0.0, 0.3, 1.0, 5.0):
            assert allocate(probes, limit).error <= limit + 1e-12
        points = curve(probes)
        assert points[0].error <= points[-1].error
        assert all(a.us > b.us for a, b in pairwise(points))


def test_the_allocation_is_the_optimum_of_brute_force() -> None:
    torch.manual_seed(0)
    for _ in range(10):
        table = torch.rand(5, 4, 2).tolist()
        probes = {str(i): [Probe(str(i), str(j), *pair) for j, pair in enumerate(row)] for i, row in enumerate(table)}
        sums = [[sum(part) for part in zip(*chosen, strict=True)] for chosen in product(*table)]
        limit = min(error for error, _ in sums) + float(torch.rand(()))
        assert allocate(probes, limit).us == pytest.approx(min(us for error, us in sums if error <= limit))


@pytest.mark.parametrize("budget", [Budget(cosine=0.9995), Budget(sqnr_db=33), Budget(kl=1e-4)])
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


def test_a_budget_needs_two_batches() -> None:
    model, batches = model_and_batches(1)
    with pytest.raises(CalibrationError, match="at least two batches"):
        fxquant.calibrate(model, batches, budget=Budget(cosine=0.9))


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


def test_scores_and_steps_of_the_ranking() -> None:
    weight = torch.ones(4, 3)
    weight[0, 1] = 5
    assert outlier_score(weight) == pytest.approx(5 / 2)
    assert outlier_score(torch.zeros(2, 2)) == 1
    assert [looser(name) for name in ("w6a6", "w8a8", "w4a16-g64")] == ["w7a7", "float", "w8a8"]


def test_the_curve_of_a_plan_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model, batches = model_and_batches()
    plan = fxquant.calibrate(model, batches, budget=Budget(cosine=0.999)).plan
    assert plan is not None
    for name in ("curve.png", "curve.svg"):
        plot_budget(plan, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
