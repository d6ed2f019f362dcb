"""Plots, written as PNG or SVG by the ending of the path."""

from pathlib import Path
from typing import TYPE_CHECKING

from fxquant.errors import ReportError

if TYPE_CHECKING:
    from fxquant.calibration.budgeting import BudgetedPlan


def plot_budget(plan: "BudgetedPlan", path: str | Path) -> None:
    """The predicted time of all linears against the predicted error of every plan on the front, the chosen one marked.

    Raises:
        ReportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ReportError("plots need matplotlib; install it, or read plan.curve") from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    points = [(point.error, point.us) for point in plan.curve if point.error > 0]
    axes.plot(*zip(*points, strict=True), marker=".", linewidth=1, label="plans on the front")
    chosen = next((point for point in plan.curve if point.schemes == plan.schemes and point.error > 0), None)
    if chosen is not None:
        axes.plot([chosen.error], [chosen.us], marker="o", color="C1", linestyle="", label="chosen")
    axes.axhline(plan.float_us, color="grey", linestyle=":", label="all float")
    axes.set(xscale="log", xlabel="predicted error of the outputs", ylabel="time of all linears, us a call", ylim=(0, None))
    axes.legend()
    figure.savefig(str(path), dpi=120)
