"""What must hold once a graph is planned: every pattern of the options names a site, and the calibration is of this model."""

from collections.abc import Iterable, Sequence
from typing import Any

from fxquant._compat import frame_values
from fxquant.errors import CalibrationError
from fxquant.plan import names_absent_weight, refuse_patterns, unmatched_patterns
from fxquant.planning import Planned
from fxquant.sites import Site
from fxquant.tracker import CompiledGraph, tracker


def check_patterns(sites: tuple[Site, ...], args: Sequence[Any], graph: CompiledGraph) -> None:
    """A pattern that no graph of the function matches is an error, unless another part or branch of it may match."""
    graph.unmatched = unmatched_patterns(graph.config, sites)
    if graph.is_partial or tracker().has_partial(graph.config):
        return
    present, within_reach = set(map(id, args)), frame_values()
    unmatched = tracker().still_unmatched(graph)
    refuse_patterns((p for p in unmatched if not names_absent_weight(p, within_reach, present)), sites)


def check_calibration(planned: Planned, graph: CompiledGraph) -> None:
    """A calibration that fits no linear of the graph is that of another model, unless this graph is only a part of one."""
    calibration, shapes = graph.config.calibration, planned.quantized
    if calibration is None or not shapes or graph.is_partial or tracker().has_partial(graph.config):
        return
    if any(verdict.calibrated is not None for verdict in planned.verdicts.values()):
        return
    moved = [name for by_site in calibration.vectors.values() for name in by_site]
    known = {name: calibration.sites[name].shape for name in planned.nodes if name in calibration.sites}
    if any(shapes.get(name, shape) == shape for name, shape in known.items()) or planned.nodes.keys() & moved:
        return
    found = f"it knows {_some([*calibration.sites, *moved, *calibration.attention])}, and this graph has {_some(shapes)}"
    if known:
        name, shape = next(iter(known.items()))
        found = f"{name!r} has a weight {[*shape]} in it and {[*shapes[name]]} here"
    raise CalibrationError(f"a calibration of another model: {found}; calibrate the module or function that is compiled")


def _some(names: Iterable[str]) -> str:
    first = list(dict.fromkeys(names))
    return ", ".join(map(repr, first[:3])) + (f" and {len(first) - 3} more" if len(first) > 3 else "")
