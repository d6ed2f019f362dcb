"""Which linears cost the most: one row a site, worst first, and the three to loosen next.

For each site: what the model's outputs lose when it alone is quantized (SQNR and cosine), the share of its activation codes
that flip when everything before it is quantized too, and the outlier score of its weight, max_j(max_i |W_ij| / mean_i |W_ij|)
over input features j (QuantMoE-Bench, arXiv 2406.08155).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxquant.budget import Budget
from fxquant.calibration.reconstruction.coded import CodedLinear, computed
from fxquant.calibration.sensitivity import coded_linear, references
from fxquant.calibration.study import NAMED, LinearSite, Study, refuse_no_batches
from fxquant.config import FxQuantConfig
from fxquant.errors import CalibrationError
from fxquant.planning import calibrated
from fxquant.schemes import LinearScheme

LOOSEN = 3
_LOOSER = ("w4a4", "w6a6", "w7a7", "w8a7", "w8a8", "float")
_WIDEST = "w8a8"
SQNR, COSINE = Budget(sqnr_db=0.0), Budget(cosine=0.0)  # only what they measure


@dataclass(frozen=True)
class SiteError:
    """One linear: its scheme, and what it costs. ``flipped`` is a share, None where activations stay float."""

    site: str
    scheme: str
    sqnr_db: float
    cosine: float
    flipped: float | None
    outliers: float


@dataclass(frozen=True)
class Ranking:
    """Sites by the error they cause, worst first; ``total_db`` and ``total_cosine`` are those of all together."""

    rows: tuple[SiteError, ...]
    total_db: float
    total_cosine: float

    @property
    def loosen(self) -> dict[str, str]:
        """The worst three and the next looser scheme for each, as the option ``sites`` takes it."""
        return {row.site.partition(":")[0] or "*": looser(row.scheme) for row in self.rows[:LOOSEN]}

    def __str__(self) -> str:
        lines = [f"{'SQNR dB':>8} {'1-cosine':>9} {'flipped':>8} {'outliers':>9}  site (scheme)"]
        for row in self.rows:
            flipped = "-" if row.flipped is None else f"{row.flipped:.1%}"
            lines.append(
                f"{row.sqnr_db:8.1f} {1 - row.cosine:9.2e} {flipped:>8} {row.outliers:9.1f}  {row.site} ({row.scheme})"
            )
        lines.append(f"all together: {self.total_db:.1f} dB, cosine {self.total_cosine:.5f}")
        return "\n".join([*lines, f"loosen next: sites={self.loosen}"])


def looser(scheme: str) -> str:
    """The next scheme with more bits, float in the end."""
    if scheme in _LOOSER:
        return _LOOSER[_LOOSER.index(scheme) + 1]
    return _WIDEST


def rank(model: Callable[..., Any], batches: Iterable[Any], config: FxQuantConfig) -> Ranking:
    """The ranking of all linears that the options quantize, on the given batches.

    Raises:
        CalibrationError: there is no batch, an input or a weight is not finite, or nothing would be quantized.
    """
    refuse_no_batches(batches)
    kept = list(batches)
    if not kept:
        raise CalibrationError("there is no batch to rank errors on")
    study = Study(model, config)
    wanted = references(study, kept)
    schemes = {name: site.scheme for name, site in study.sites.items() if site.scheme is not None}
    if not schemes:
        why = f"the options leave {', '.join([*study.sites][:NAMED])} float" if study.sites else study.nothing
        raise CalibrationError(f"no linear would be quantized, so none causes an error: {why}")
    linears = {name: _coded(study.sites[name], scheme, config) for name, scheme in schemes.items()}
    overrides = {name: computed(each, partial(getattr, each, "value")) for name, each in linears.items()}
    flips = _flips(study, kept, linears, overrides)
    rows = []
    for name, scheme in schemes.items():
        study.overrides = {name: overrides[name]}
        noise, angle = _errors(study, kept, wanted)
        score = outlier_score(study.sites[name].weight)
        rows.append(SiteError(name, str(scheme), SQNR.value(noise), 1 - angle, flips[name], score))
    study.overrides = overrides
    noise, angle = _errors(study, kept, wanted)
    rows.sort(key=lambda row: (row.sqnr_db, row.site))
    return Ranking(tuple(rows), SQNR.value(noise), 1 - angle)


def outlier_score(weight: Tensor) -> float:
    """max_j(max_i |W_ij| / mean_i |W_ij|) of a weight [N, K]; input features that are all zero count as 1."""
    size = weight.to(torch.float32).abs()
    mean = size.mean(0)
    return float(torch.where(mean > 0, size.amax(0) / mean, 1.0).amax())


def _errors(study: Study, batches: list[Any], wanted: list[Any]) -> tuple[float, float]:
    """Mean noise over signal and mean 1 - cosine over batches."""
    got = [study(batch) for batch in batches]
    return tuple(  # type: ignore[return-value]
        sum(budget.error(y, other) for y, other in zip(wanted, got, strict=True)) / len(batches) for budget in (SQNR, COSINE)
    )


def _coded(site: LinearSite, scheme: LinearScheme, config: FxQuantConfig) -> CodedLinear:
    """A site as it will be compiled: with what the calibration of the options knows of it."""
    known, _ = calibrated(site.name, scheme, site.shape, config.calibration)
    return coded_linear(site, scheme, known)


def _flips(
    study: Study, batches: list[Any], linears: Mapping[str, CodedLinear], overrides: Mapping[str, Any]
) -> dict[str, float | None]:
    """The share of activation codes of every site that differ between a float and a quantized model."""
    flipped, seen = dict.fromkeys(linears, 0), dict.fromkeys(linears, 0)
    codes: dict[str, list[Tensor]] = {}

    def remember(name: str, x: Tensor) -> None:
        found = linears[name].act_codes(x) if name in linears else None
        if found is not None:
            codes.setdefault(name, []).append(found)

    def compare(name: str, x: Tensor) -> None:
        if codes.get(name):
            before = codes[name].pop(0)
            flipped[name] += int(before.ne(linears[name].act_codes(x)).sum())  # type: ignore[arg-type]
            seen[name] += before.numel()

    for batch in batches:
        study.watch, study.overrides = remember, {}
        study(batch)
        study.watch, study.overrides = compare, overrides
        study(batch)
    study.watch, study.overrides = None, {}
    return {name: flipped[name] / max(seen[name], 1) if name in codes else None for name in linears}
