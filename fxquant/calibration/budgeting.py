"""The fastest plan that keeps a budget: probe every site, allocate bits, measure the plan as a whole, tighten if need be.

Errors of single sites add up only for small noise, so the allocation is measured on batches that the probes did not see. The
mean over them plus ``CERTAINTY`` standard errors has to keep the budget; otherwise the limit is tightened and the bits are
allocated again.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fxquant.budget import Budget
from fxquant.calibration.allocation import Allocation, curve, within
from fxquant.calibration.sensitivity import Probe, measure, specification
from fxquant.calibration.study import Linear, Study
from fxquant.errors import CalibrationError
from fxquant.schemes import LinearScheme, parse_scheme

SCHEMES = tuple(map(parse_scheme, ("w8a8", "w8a7", "w7a7", "w6a6")))  # what a site may become besides float
PROBED, CHECKED = 4, 8  # batches, at most
CERTAINTY = 2.0
MARGIN, TIGHTER, ATTEMPTS = 0.8, 0.7, 12  # of the limit at first, then each time; below 0.02 of it nothing is left


@dataclass(frozen=True)
class BudgetedPlan:
    """Site → scheme name, with the error that was measured on data the probes did not see, and what else was on offer.

    ``us`` is the predicted time of all linears of a call, ``float_us`` that of the float model.
    """

    schemes: Mapping[str, str]
    error: float
    us: float
    float_us: float
    curve: tuple[Allocation, ...]
    probes: Mapping[str, tuple[Probe, ...]]


def split(batches: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Batches to probe on and batches to check on: alternating, and disjoint where there are two.

    Raises:
        CalibrationError: there are fewer than two.
    """
    if len(batches) < 2:
        raise CalibrationError("a budget needs at least two batches: some to choose by, others to check the choice on")
    return list(batches[::2])[:PROBED], list(batches[1::2])[:CHECKED]


def keep_budget(
    study: Study,
    batches: Sequence[Any],
    budget: Budget,
    schemes: Sequence[LinearScheme] = SCHEMES,
    on_probe: Callable[[int, int], None] = lambda done, total: None,
) -> BudgetedPlan:
    """The fastest plan found whose error on unseen batches keeps the budget; all float keeps every budget."""
    probed, checked = split(batches)
    probes = measure(study, probed, schemes, budget.error, on_probe)
    wanted = [study(batch) for batch in checked]
    front = curve(probes)
    limit, known = budget.limit * MARGIN, {str(scheme): scheme for scheme in schemes}
    for _ in range(ATTEMPTS):
        found = within(front, limit)
        error = _measured(study, checked, wanted, budget, _overrides(study, found.schemes, known))
        if error <= budget.limit:
            break
        limit *= TIGHTER
    else:
        found, error = within(front, 0.0), 0.0
    float_us = sum(probe.us for options in probes.values() for probe in options if probe.scheme == "float")
    kept = {name: tuple(options) for name, options in probes.items()}
    return BudgetedPlan(found.schemes, error, found.us, float_us, tuple(front), kept)


def _measured(
    study: Study, batches: Sequence[Any], wanted: Sequence[Any], budget: Budget, overrides: Mapping[str, Linear]
) -> float:
    """The mean error of a plan over batches, plus what it may be off by."""
    study.overrides = overrides
    errors = [budget.error(y, study(batch)) for y, batch in zip(wanted, batches, strict=True)]
    study.overrides = {}
    mean = sum(errors) / len(errors)
    spread = sum((error - mean) ** 2 for error in errors) / max(len(errors) - 1, 1)
    return mean + CERTAINTY * math.sqrt(spread / len(errors))


def _overrides(study: Study, schemes: Mapping[str, str], known: Mapping[str, LinearScheme]) -> dict[str, Linear]:
    return {name: specification(study.sites[name], known[scheme]) for name, scheme in schemes.items() if scheme in known}
