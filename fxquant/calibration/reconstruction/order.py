"""In which order the linears of a graph are rounded: stages (those that read one value), and blocks of stages.

A block is what shares a numbered module: ``encoder.layer.3.attention.q:linear`` is of ``encoder.layer.3``. What stands in no
numbered module is a block of its own.
"""

import re
from collections.abc import Collection, Iterable
from itertools import groupby

from torch import fx

from fxquant.calibration.study import Studied

Stage = tuple[str, ...]  # names of sites that read one value, in order
_NUMBERED = re.compile(r"^(?:.*?\.)??\d+(?=[.:])")


def stages(graph: Studied, wanted: Collection[str]) -> list[Stage]:
    """The sites among ``wanted`` by the value that they read, in the order in which the graph reaches them."""
    found: dict[fx.Node, list[str]] = {}
    for node in graph.nodes:
        name = graph.names.get(node)
        if name in wanted and name is not None:
            found.setdefault(node.all_input_nodes[0], []).append(name)
    return [tuple(names) for names in found.values()]


def block_of(name: str) -> str:
    """The numbered module of a site, or the site itself."""
    match = _NUMBERED.match(name)
    return match.group() if match else name


def blocks(ordered: Iterable[Stage]) -> list[list[Stage]]:
    """Neighbouring stages of one block."""
    return [list(same) for _, same in groupby(ordered, lambda stage: block_of(stage[0]))]
