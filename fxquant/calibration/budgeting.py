"""The fastest plan that keeps a budget: probe every unit, allocate bits, measure plans as a whole.

Errors of single units add up only for small noise, so allocations are measured on batches that the probes did not see. The
mean over them plus ``CERTAINTY`` standard errors has to keep the budget. The limit of the allocation is moved until it is as
close to the budget as a few measurements bring it; a plan of one scheme for all that is faster and keeps the budget wins.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fxquant.budget import Budget
from fxquant.calibration.allocation import Allocation, curve, uniform, within
from fxquant.calibration.sensitivity import Probe, measure, references, specification, units
from fxquant.calibration.study import Study
from fxquant.errors import CalibrationError
from fxquant.schemes import LinearScheme, parse_scheme

# What a unit may become besides float: of the panel kernels those down to 12 bits in all; fewer are hardly faster on AVX2.
SCHEMES = tuple(map(parse_scheme, ("w8a8", "w8a7", "w7a8", "w7a7", "w6a8", "w8a6", "w7a6", "w6a7", "w6a6", "w5a7", "w4a8")))
PROBED, CHECKED = 4, 8  # batches, at most
PROBES = 300  # units times batches, at most, where one batch has fewer: a model of many units is probed on fewer batches
CERTAINTY = 3.0  # of Student's t with the 7 degrees of freedom of 8 batches: 99 %
MARGIN, ATTEMPTS, CLOSE = 0.8, 7, 1.03  # of the limit at first, measurements, factor between limits that end the search


@dataclass(frozen=True)
class BudgetedPlan:
    """Site → scheme name, with the error that was measured on data the probes did not see, and what else was on offer.

    ``us`` is the predicted time of all linears of a call, ``float_us`` that of the float model. ``probes``: those of every
    unit of linears that read one value.
    """

    schemes: Mapping[str, str]
    error: float
    us: float
    float_us: float
    curve: tuple[Allocation, ...]
    probes: tuple[tuple[Probe, ...], ...]

    @property
    def islands(self) -> tuple[str, ...]:
        """The sites that stay float because the budget has no room for them."""
        return tuple(name for name, scheme in self.schemes.items() if scheme == "float")

    def plot(self, path: str | Path) -> None:
        """Draw the curve of time against error, with the chosen plan marked, as PNG or SVG by the ending of the path.

        Raises:
            ReportError: matplotlib is not installed.
        """
        from fxquant.reporting.plots import plot_budget

        plot_budget(self, path)


def split(batches: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Batches to probe on and batches to check on: every third one, and the others.

    Raises:
        CalibrationError: there are fewer than two.
    """
    if len(batches) < 2:
        raise CalibrationError("a budget needs at least two batches: some to choose by, others to check the choice on")
    return list(batches[::3])[:PROBED], [batch for i, batch in enumerate(batches) if i % 3][:CHECKED]


def keep_budget(
    study: Study,
    batches: Sequence[Any],
    budget: Budget,
    schemes: Sequence[LinearScheme] = SCHEMES,
    on_probe: Callable[[int, int], None] = lambda done, total: None,
) -> BudgetedPlan:
    """The fastest plan found whose error on unseen batches keeps the budget; all float keeps every budget.

    Linears whose scheme was asked for by name keep it, and their error counts.

    Raises:
        CalibrationError: there are fewer than two batches, no linear ran, an input is not finite, or the schemes that were
            asked for by name alone exceed the budget.
    """
    probed, checked = split(batches)
    check = _Check(study, budget, {str(scheme): scheme for scheme in schemes}, checked, references(study, checked))
    references(study, probed)
    if not study.sites:
        raise CalibrationError(study.nothing)
    probed = probed[: max(PROBES // max(len(units(study)), 1), 1)]
    study.overrides = check.fixed
    probes = measure(study, probed, schemes, budget.error, on_probe)
    study.overrides = {}
    front = curve(probes)
    found = _largest(front, check)
    for plan in _faster_uniform(probes, schemes, found):
        if check.keeps(plan):
            found = plan
            break
    float_us = sum(probe.us for options in probes for probe in options if probe.scheme == "float")
    return BudgetedPlan(found.schemes, check(found), found.us, float_us, tuple(front), tuple(map(tuple, probes)))


@dataclass
class _Check:
    """Measures plans as a whole, each once."""

    study: Study
    budget: Budget
    known: Mapping[str, LinearScheme]
    batches: Sequence[Any]
    wanted: Sequence[Any]
    _errors: dict[tuple[str, ...], float] = field(default_factory=dict)

    @property
    def fixed(self) -> dict[str, Any]:
        """The linears whose scheme was asked for by name, as their specifications."""
        sites = [site for site in self.study.sites.values() if site.is_explicit and site.scheme is not None]
        return {site.name: specification(site, site.scheme) for site in sites if site.scheme is not None}

    def keeps(self, plan: Allocation) -> bool:
        """Whether a plan keeps the budget."""
        return self(plan) <= self.budget.limit

    def __call__(self, plan: Allocation) -> float:
        """The mean error of a plan over the batches, plus what it may be off by."""
        key = tuple(plan.schemes.values())
        if key not in self._errors:
            self._errors[key] = self._measured(plan.schemes)
        return self._errors[key]

    def _measured(self, schemes: Mapping[str, str]) -> float:
        sites = self.study.sites
        chosen = {name: specification(sites[name], self.known[scheme]) for name, scheme in schemes.items() if scheme != "float"}
        self.study.overrides = {**self.fixed, **chosen}
        errors = [self.budget.error(y, self.study(batch)) for y, batch in zip(self.wanted, self.batches, strict=True)]
        self.study.overrides = {}
        mean = sum(errors) / len(errors)
        spread = sum((error - mean) ** 2 for error in errors) / max(len(errors) - 1, 1)
        return mean + CERTAINTY * math.sqrt(spread / len(errors))


def _largest(front: Sequence[Allocation], check: _Check) -> Allocation:
    """The fastest on the front that keeps the budget, as far as a few measurements tell."""
    best, low, high = within(front, 0.0), 0.0, math.inf
    limit = check.budget.limit * MARGIN
    for _ in range(ATTEMPTS):
        found = within(front, limit)
        error = check(found)
        if error <= check.budget.limit:
            best, low = found, max(limit, found.error)
            if found is front[-1]:
                break
        else:
            high = limit
        if high <= low * CLOSE:
            break
        wanted = limit * check.budget.limit / error * 0.98 if error > 0 else math.inf
        bottom, top = (low * 1.01, high / 1.01) if low > 0 else (limit / 20, limit * 0.9)
        limit = min(max(wanted, bottom), top, front[-1].error)
    if not check.keeps(best):
        value = check.budget.value(check(best))
        raise CalibrationError(
            f"the schemes that the options name for single sites alone exceed the budget ({value:.4g}); "
            "loosen the budget, or leave these sites to it"
        )
    return best


def _faster_uniform(probes: Sequence[Sequence[Probe]], schemes: Sequence[LinearScheme], found: Allocation) -> list[Allocation]:
    """One scheme for all, where that is predicted to be faster than what was found, the fastest first."""
    plans = [uniform(probes, str(scheme)) for scheme in schemes]
    return sorted((plan for plan in plans if plan is not None and plan.us < found.us), key=lambda plan: (plan.us, plan.error))
