"""A graph's run on one batch that can stand still: at the inputs of a linear, or between two blocks.

Two walks over the same graph, one in float and one with coded linears, give at every place what a linear reads and what it
should have read. A walk holds the values that later nodes still read, and no others.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.calibration.study import Studied, Study
from fxquant.errors import CalibrationError


class Walk:
    """Stands before node number ``place``; ``values`` holds what was computed and is still read.

    ``overrides`` of the study decide how linears are computed on the way.
    """

    def __init__(self, graph: Studied, inputs: Sequence[Any]) -> None:
        self.graph = graph
        self.nodes = graph.nodes
        self.places = {name: self.nodes.index(node) for node, name in graph.names.items()}
        placeholders = [node for node in self.nodes if node.op == "placeholder"]
        self.values: dict[fx.Node, Any] = dict(zip(placeholders, inputs, strict=True))
        self.place = 0
        self.output: Any = None

    def fork(self) -> "Walk":
        """Another walk from here on; values are shared, and no node writes to them."""
        other = object.__new__(Walk)
        other.__dict__.update(self.__dict__, values=dict(self.values))
        return other

    def advance(self, place: int) -> "Walk":
        """Run up to the node number ``place``, which is not run.

        Raises:
            CalibrationError: the walk is past it.
        """
        if place < self.place:
            raise CalibrationError(f"a walk cannot go back to node {place}; it stands at {self.place}")
        interpreter = self.graph
        before, interpreter.env = interpreter.env, self.values
        try:
            for node in self.nodes[self.place : place]:
                if node.op == "output":
                    self.output = interpreter.run_node(node)
                elif node.op != "placeholder":
                    self.values[node] = interpreter.run_node(node)
                for done in interpreter.user_to_last_uses.get(node, ()):
                    self.values.pop(done, None)
        finally:
            interpreter.env = before
        self.place = max(place, self.place)
        return self

    def finish(self) -> Any:
        """Run to the end: what the graph returns."""
        self.advance(len(self.nodes))
        return self.output

    def site(self, name: str) -> fx.Node:
        """The node of a linear."""
        node: fx.Node = self.nodes[self.places[name]]
        return node

    def input_of(self, name: str) -> Tensor:
        """What a linear reads; the walk stands before it."""
        value: Tensor = self.values[self.site(name).all_input_nodes[0]]
        return value

    def handed_on(self, place: int) -> list[Tensor]:
        """The tensors of floats that nodes from number ``place`` on computed and that are read later, or returned."""
        if self.place == len(self.nodes):
            found = self.output if isinstance(self.output, (tuple, list)) else [self.output]
        else:
            late = {node for node in self.nodes[place : self.place] if node.op != "placeholder"}
            found = [value for node, value in self.values.items() if node in late]
        return [value for value in found if isinstance(value, Tensor) and value.is_floating_point()]


def walks(study: Study, batches: Iterable[Any], method: str) -> list[Walk]:
    """One walk a batch, at its beginning.

    Raises:
        CalibrationError: the model is more than one graph, so that there is no order of its sites within one run.
    """
    found = []
    for batch in batches:
        graphs = [each for each in study.graphs(batch) if each[0].names]
        if not graphs:  # a batch without rows
            continue
        if len(graphs) != 1:
            raise CalibrationError(
                f"{method} follows one graph from the input to the output, and this model is {len(graphs)} graphs with "
                "linears; remove its graph breaks (fxquant.explain shows the graphs), or use the method gptq"
            )
        found.append(Walk(*graphs[0]))
    return found


def advance_all(study: Study, moved: Sequence[Walk], place_of: Callable[[Walk], int | None], overrides: Any) -> None:
    """Advance walks without gradients, linears computed by ``overrides``; None: a walk stays where it is."""
    with torch.no_grad(), study.computing(overrides):
        for walk in moved:
            place = place_of(walk)
            if place is not None:
                walk.advance(place)
