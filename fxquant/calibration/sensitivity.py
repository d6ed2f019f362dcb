"""What each linear costs the model's outputs when it alone is quantized, and what it would save.

A probe runs the float model with one linear as its specification. For small errors the noises of sites add up, so one probe
a site and scheme is enough to choose from; the choice is then measured as a whole.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxquant import reference
from fxquant.calibration.study import Linear, LinearSite, Study
from fxquant.lowering.isa import current_isa
from fxquant.lowering.pack import round_weight
from fxquant.lowering.timings import linear_timing
from fxquant.schemes import FormatScheme, LinearScheme

# Where no table was measured a multiply-accumulate costs this many picoseconds by bits of weight and activation, from the
# peaks of AVX2 with two threads (cpu-kernels: 226 GFMA/s float, 738 and 364 GOP/s of 8- and 16-bit products).
FLOAT_PS, WIDE_PS, NARROW_PS = 5.9, 3.4, 2.0


@dataclass(frozen=True)
class Probe:
    """One site in one scheme (``float``: as it is): the error that it alone causes, and its microseconds a call."""

    site: str
    scheme: str
    error: float
    us: float


def measure(
    study: Study,
    batches: Sequence[Any],
    schemes: Sequence[LinearScheme],
    error: Callable[[Any, Any], float],
    on_probe: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[Probe]]:
    """The probes of every linear that ran, float among them; ``on_probe`` hears how many are done.

    The study is left as it was found.
    """
    wanted = [study(batch) for batch in batches]
    rows = {name: site.rows or 1 for name, site in study.sites.items()}
    total, done = len(study.sites) * len(schemes), 0
    found: dict[str, list[Probe]] = {}
    before = study.overrides
    for name, site in study.sites.items():
        found[name] = [Probe(name, "float", 0.0, cost_us(site, None, rows[name]))]
        for scheme in schemes:
            study.overrides = {**before, name: specification(site, scheme)}
            cost = sum(error(y, study(batch)) for y, batch in zip(wanted, batches, strict=True)) / len(batches)
            found[name].append(Probe(name, str(scheme), cost, cost_us(site, scheme, rows[name])))
            done += 1
            on_probe(done, total)
    study.overrides = before
    return found


def specification(site: LinearSite, scheme: LinearScheme) -> Linear:
    """What a linear computes in a scheme, with dynamic activations."""
    value = round_weight(site.weight, scheme).value

    def compute(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        coded = fake_quant_input(x.to(torch.float32), scheme)
        bias = None if bias is None else bias.to(torch.float32)
        return torch.nn.functional.linear(coded, value, bias).to(x.dtype)

    return compute


def fake_quant_input(x: Tensor, scheme: LinearScheme) -> Tensor:
    """x as the dynamic activations of a scheme leave it."""
    if isinstance(scheme, FormatScheme):
        return x if scheme.activation is None else scheme.activation.fake_quant(x)
    return x if scheme.is_weight_only else reference.fake_quant_per_token(x, scheme.act_bits)


def cost_us(site: LinearSite, scheme: LinearScheme | None, rows: int) -> float:
    """Microseconds of a linear: by the measured table of the instruction set, else by the peaks of its arithmetic."""
    n, k = site.shape
    timing = linear_timing(current_isa(), None if scheme is None else str(scheme), rows, k, n)
    if timing is not None:
        floats = min(timing.float_us, timing.own_float_us or timing.float_us)
        if scheme is None or timing.scheme_us is not None:
            return floats if scheme is None else float(timing.scheme_us or 0.0)
    return rows * n * k * _picoseconds(scheme) * 1e-6


def _picoseconds(scheme: LinearScheme | None) -> float:
    if scheme is None or isinstance(scheme, FormatScheme) or scheme.is_weight_only:
        return FLOAT_PS
    bits = scheme.weight_bits + scheme.act_bits
    return WIDE_PS if bits > 15 else NARROW_PS * (1 + 0.05 * (bits - 12))


def by_site(probes: Mapping[str, Sequence[Probe]]) -> list[Probe]:
    """The worst probe of every site, worst first."""
    return sorted((max(found, key=lambda probe: probe.error) for found in probes.values()), key=lambda probe: -probe.error)
