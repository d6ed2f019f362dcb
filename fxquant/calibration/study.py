"""A model that runs in float, graph by graph in its recognised form, with every linear within reach.

What calibration, sensitivity and error ranking share: ``watch`` sees the input of each linear, ``watch_attention`` the operands
of each attention by the names of ``passes.fuse.attention.operands`` (and its path), ``overrides`` computes linears in another
way. Nothing is compiled.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.backend import analyse
from fxquant.binding import Binder, Program, frozen_value
from fxquant.calibration.attention import attention_path
from fxquant.calibration.files import Vectors
from fxquant.calibration.sources import own_vectors
from fxquant.capture import compiled_call
from fxquant.config import FxQuantConfig
from fxquant.errors import CalibrationError
from fxquant.linear_choice import rows_hint
from fxquant.lowering.isa import current_isa
from fxquant.passes.fuse import attention
from fxquant.passes.fuse.folded import bind_folded
from fxquant.passes.fuse.row_nodes import is_alias
from fxquant.passes.quantize.linear import conditions
from fxquant.passes.reparam import reparameterize
from fxquant.passes.rule import Event
from fxquant.plan import origin, resolve_scheme, setting_for
from fxquant.reporting.dump import Dumper
from fxquant.schemes import LinearScheme
from fxquant.sites import find_sites, kind_of
from fxquant.tracker import CompiledGraph

NAMED = 3  # refused linears, at most, in a sentence
_PLACE = "\n\nWhile executing"  # from here on fx.Interpreter says which node it was
Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (x, weight, bias) → y


@dataclass(frozen=True)
class LinearSite:
    """One linear: its weight [N, K], the scheme that the options give it (None: float), and how often it multiplies.

    ``is_explicit``: the scheme was asked for by name. ``rows`` are those of its input where they are known when captured,
    ``reads`` names that input: linears that share it have the same. ``comes_from`` is the kind of operator that made it,
    such as layer_norm or gelu, where that is a candidate itself.
    """

    name: str
    weight: Tensor
    scheme: LinearScheme | None
    is_explicit: bool
    rows: int | None
    reads: str = ""
    comes_from: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return int(self.weight.shape[0]), int(self.weight.shape[1])

    def refuse_not_finite(self) -> None:
        """Refuse a weight with NaN or infinity: what follows it would be blamed on the data.

        Raises:
            CalibrationError: naming the site.
        """
        bad = int((~torch.isfinite(self.weight)).sum())
        if bad:
            raise CalibrationError(f"{self.name}: the weight holds {bad} values that are not finite")


@dataclass
class Prefix:
    """The values of one batch up to a linear, so that what differs from there on need not run the rest again.

    ``owner`` and ``position``: the graph, and how many of its nodes are done.
    """

    owner: "Studied | None" = None
    position: int = 0
    values: dict[fx.Node, Any] = field(default_factory=dict)


class Study:
    """``study(batch)`` runs the model on a batch; ``sites`` fills at the first one.

    ``prepare`` gives the vectors of migrations that each graph, after the folds of the options, goes through before anything
    is watched; ``vectors`` collects them, ``migrations`` what the rules did.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        config: FxQuantConfig,
        prepare: Callable[[fx.GraphModule], Vectors] | None = None,
    ) -> None:
        self.config, self._prepare = config, prepare
        self.vectors: dict[str, dict[str, Mapping[str, Tensor]]] = {}
        self.migrations: list[Event] = []
        self._call = compiled_call(model, self._backend)
        self.sites: dict[str, LinearSite] = {}
        self.refused: dict[str, str] = {}  # linear → the sentence why it cannot be quantized
        self.watch: Callable[[str, Tensor], None] | None = None
        self.watch_attention: Callable[[str, Mapping[str, Any]], None] | None = None
        self.overrides: Mapping[str, Linear] = {}
        self.runs = 0  # of graphs: several a call where the model has graph breaks
        self.resumed: tuple[str, Prefix] | None = None
        self._recorded: list[tuple[Studied, tuple[Any, ...]]] | None = None

    def __call__(self, batch: Any) -> Any:
        """The model's output for a tensor, a tuple (positional arguments) or a mapping (keyword arguments)."""
        try:
            with torch.no_grad():
                return self._call(*arguments(batch))
        except CalibrationError as error:  # it names its site already
            raise CalibrationError(str(error).partition(_PLACE)[0]) from None

    def resume(self, batch: Any, name: str, prefix: Prefix) -> Any:
        """The same as a call where no linear before ``name`` is computed in another way than when the prefix was made.

        Only for models of one graph; the prefix moves on to ``name``.
        """
        self.resumed = name, prefix
        try:
            return self(batch)
        finally:
            self.resumed = None

    def graphs(self, batch: Any) -> "list[tuple[Studied, tuple[Any, ...]]]":
        """The graphs that a batch goes through, each with its inputs, weights among them: to be run in another way."""
        found: list[tuple[Studied, tuple[Any, ...]]] = []
        self._recorded = found
        try:
            self(batch)
        finally:
            self._recorded = None
        return found

    @contextmanager
    def computing(self, overrides: Mapping[str, Linear]) -> Iterator[None]:
        """These linears, and no others, are computed in another way inside."""
        before, self.overrides = self.overrides, overrides
        try:
            yield
        finally:
            self.overrides = before

    def linear(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What stands in the place of a linear."""
        if self.watch is not None:
            self.watch(name, x)
        compute = self.overrides.get(name)
        return torch.nn.functional.linear(x, weight, bias) if compute is None else compute(x, weight, bias)

    @property
    def nothing(self) -> str:
        """The sentence for a study that has met no linear that could be quantized."""
        reasons = "; ".join(f"{name}: {sentence}" for name, sentence in list(self.refused.items())[:NAMED])
        return f"no linear that could be quantized ran on these batches{': ' if reasons else ''}{reasons}"

    def _backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graph = CompiledGraph(gm, example_inputs, self.config, current_isa())
        captured, _ = analyse(gm, example_inputs, graph, Dumper(None, graph.record.name))
        if self._prepare is not None:
            self._migrate(captured.gm, self._prepare(captured.gm), example_inputs)
        names: dict[fx.Node, str] = {}
        attentions: dict[fx.Node, str] = {}
        for node, (site, *_) in find_sites(captured.gm.graph).items():
            if site.kind == "attention.qk" and all(holds for _, holds in attention.conditions(node)):
                attentions[node] = attention_path(site.name)
            x, weight = (*node.args, None)[:2]
            if site.kind != "linear" or not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
                continue
            refusal = next((sentence for sentence, holds in conditions(x, weight) if not holds), None)
            if refusal is not None:
                self.refused[site.name] = refusal
            else:
                setting = setting_for(site, self.config)
                scheme = resolve_scheme(setting, current_isa(), x)
                names[node] = site.name
                self.sites[site.name] = LinearSite(
                    site.name,
                    frozen_value(weight)(example_inputs),
                    None if isinstance(scheme, str) else scheme,
                    setting != "auto",
                    rows_hint(node),
                    f"{graph.record.name} {_unviewed(x).name}",
                    kind_of(origin(x)),
                )
        folded, kept = bind_folded(captured.gm, captured.fake_mode, tuple(range(len(example_inputs))))
        studied = Studied(captured.gm, names, attentions, self)

        def run(*values: Any) -> Any:
            if self._recorded is not None:
                self._recorded.append((studied, values))
            return studied.run(*values)

        program = Program(run, folded, kept)
        binder = Binder(program, lambda reasons: program, lambda packed, weights: None)
        return lambda *values: binder(values)

    def _migrate(self, gm: fx.GraphModule, vectors: Vectors, args: Sequence[Any]) -> None:
        sites = {site.name: node for node, found in find_sites(gm.graph).items() for site in found}
        self.migrations += reparameterize(gm, sites, own_vectors(vectors, sites, args).vectors)
        for rule, by_site in vectors.items():
            self.vectors.setdefault(rule, {}).update(by_site)


class Studied(fx.Interpreter):
    """Runs a graph and hands its linears and attentions to a study; ``names`` are those of the linears."""

    def __init__(
        self, gm: fx.GraphModule, names: Mapping[fx.Node, str], attentions: Mapping[fx.Node, str], study: Study
    ) -> None:
        super().__init__(gm)
        self.nodes = tuple(gm.graph.nodes)
        self.names, self._attentions, self.study = names, attentions, study
        self._position = {names[node]: i for i, node in enumerate(self.nodes) if node in names}
        self._is_pure = not any(_is_mutable(node) for node in self.nodes)

    def run(self, *args: Any, **keywords: Any) -> Any:
        """The graph's outputs; from the prefix on where the study resumes."""
        self.study.runs += 1
        if self.study.resumed is None or not self._is_pure:
            return super().run(*args, **keywords)
        name, prefix = self.study.resumed
        stop = self._position[name]
        if prefix.owner is not self or prefix.position > stop:
            prefix.owner, prefix.position, prefix.values = self, 0, {}
        self.args_iter, self.env = iter(args), dict(prefix.values)
        self._run_nodes(prefix.position, stop)
        prefix.position, prefix.values = stop, dict(self.env)
        return self._run_nodes(stop, len(self.nodes))

    def _run_nodes(self, first: int, end: int) -> Any:
        """The value of the last of some nodes; what no later one reads is let go."""
        for node in self.nodes[first:end]:
            self.env[node] = self.run_node(node)
            for dead in self.user_to_last_uses.get(node, ()):
                del self.env[dead]
        return self.env.pop(self.nodes[-1]) if end == len(self.nodes) else None

    def run_node(self, n: fx.Node) -> Any:
        """The node's value."""
        if n in self._attentions and self.study.watch_attention is not None:
            given = attention.operands(n).items()
            values = {name: self.env[arg] if isinstance(arg, fx.Node) else arg for name, arg in given}
            self.study.watch_attention(self._attentions[n], values)
        name = self.names.get(n)
        if name is None:
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        return self.study.linear(name, args[0], args[1], args[2] if len(args) > 2 else None)


def _is_mutable(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _unviewed(x: fx.Node) -> fx.Node:
    """The value behind views."""
    while is_alias(x) and isinstance(x.args[0], fx.Node):
        x = x.args[0]
    return x


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of a batch.

    Raises:
        CalibrationError: it is neither a tensor, nor a tuple or list, nor a mapping.
    """
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    if isinstance(batch, Tensor):
        return (batch,), {}
    raise CalibrationError(
        f"a batch is a {type(batch).__name__}; give a tensor, a tuple of positional arguments or a mapping of keyword arguments"
    )


def refuse_no_batches(batches: object) -> None:
    """Refuse what is no collection of batches, or is one batch.

    Raises:
        CalibrationError: naming the type.
    """
    if isinstance(batches, (Tensor, Mapping, str, bytes)) or not isinstance(batches, Iterable):
        raise CalibrationError(
            f"batches is a {type(batches).__name__}; give a list or a generator of batches, each a tensor, a tuple or a mapping"
        )
