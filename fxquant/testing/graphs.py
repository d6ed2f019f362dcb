"""A captured and recognised graph of a call, ready to be reparameterized and run beside eager mode."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.binding import frozen_value
from fxquant.capture import capture
from fxquant.passes.recognise import recognise
from fxquant.passes.reparam import Vectors, reparameterize, vector_inputs
from fxquant.passes.rule import Event, Fired, Refused
from fxquant.passes.verify import verify
from fxquant.sites import find_sites


@dataclass
class Captured:
    """The graph of one call, its arguments, what eager mode returns and what recognition did."""

    gm: fx.GraphModule
    args: tuple[Any, ...]
    wanted: Any
    recognised: tuple[Event, ...] = ()

    @property
    def refusals(self) -> dict[str, str | None]:
        """Recognition rule → refusal, or None where it fired."""
        fired = {event.rule.name for event in self.recognised if isinstance(event, Fired)}
        refused = {event.rule.name: event.sentence for event in self.recognised if isinstance(event, Refused)}
        return {**refused, **dict.fromkeys(fired)}

    @property
    def sites(self) -> dict[str, fx.Node]:
        """Nodes by the names of their sites."""
        return {site.name: node for node, sites in find_sites(self.gm.graph).items() for site in sites}

    def change(self, vectors: Vectors | None = None, names: Iterable[str] = ()) -> dict[str, list[str | None]]:
        """Reparameterize; rule → refusals (None where it fired)."""
        events = reparameterize(self.gm, self.sites, vectors or {}, names)
        verify(self.gm, "reparameterize")
        found: dict[str, list[str | None]] = {}
        for event in events:
            found.setdefault(event.rule.name, []).append(None if isinstance(event, Fired) else event.sentence)
        return found

    @property
    def inputs(self) -> tuple[Any, ...]:
        """Vectors, then the arguments."""
        return (*vector_inputs(self.gm.graph), *self.args)

    def run(self) -> Tensor:
        """The result of the graph."""
        with torch.no_grad():
            result = self.gm(*self.inputs)
        return result[0] if isinstance(result, (tuple, list)) else result  # type: ignore[no-any-return]

    def error(self) -> float:
        """The largest difference from eager mode, relative to its largest value."""
        return float((self.run() - self.wanted).abs().max() / self.wanted.abs().max())

    def value(self, node: Any) -> Tensor:
        """The value of a weight that the graph computes."""
        return frozen_value(node)(self.args)

    def node(self, name: str, index: int = 0) -> fx.Node:
        """A node by the bare name of its ATen operator."""
        found: list[fx.Node] = [n for n in self.gm.graph.nodes if _name(n) == f"aten::{name}"]
        return found[index]

    def count(self, name: str) -> int:
        """How many nodes have an operator."""
        return sum(_name(n) == f"aten::{name}" for n in self.gm.graph.nodes)


def _name(node: fx.Node) -> str:
    return str(getattr(getattr(node.target, "_schema", None), "name", ""))


def capture_call(function: Callable[..., Any], *args: Any) -> Captured:
    """The recognised graph of ``function(*args)`` without gradients."""
    held: list[tuple[fx.GraphModule, tuple[Any, ...], tuple[Event, ...]]] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        captured = capture(gm, inputs)
        held.append((captured.gm, tuple(inputs), tuple(recognise(captured.gm))))
        return gm.forward

    torch.compiler.reset()
    with torch.no_grad():
        wanted = function(*args)
        torch.compile(function, backend=backend, fullgraph=True)(*args)
    ((gm, inputs, events),) = held
    return Captured(gm, inputs, wanted, events)
