"""Finds and applies rules in a graph in normal form: a structural matcher on public torch.fx only.

A pattern is a plain Python function in torch's vocabulary. It is traced once, symbolically, and compared by operator name;
arguments are lined up by the graph operator's schema. Parameters bind tensors, numbers or strings. ``add`` and ``mul`` match
in both orders, dimensions count from either end, and operators that change nothing (dropout in eval mode, casts to the
same dtype, ``contiguous``) are looked through. Numbers must agree to 1e-8, relatively. Symbolic sizes are never compared,
so matching adds no guard.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxquant._compat import DYNAMO_CONTROL_FLOW, ENTER_AUTOCAST, EXIT_AUTOCAST, is_higher_order
from fxquant.errors import RuleError
from fxquant.passes.channels import look_through
from fxquant.passes.replace import insert, misfit, trace_rewrite
from fxquant.passes.reweight import Place, changes_of, reweight
from fxquant.passes.rule import Event, Fired, Refused, Rule

READ_ELSEWHERE = "an intermediate value is read elsewhere"
WRITTEN = "an in-place operator runs between the matched operators"
AUTOCAST = "an autocast region starts or ends between the matched operators"
UNKNOWN_VALUE = "the shapes and dtypes inside a vmap region are not known"
NUMBER_TOLERANCE = 1e-8

_OPERATORS = {operator.truediv: "div", operator.getitem: "getitem", operator.matmul: "matmul", operator.pow: "pow"}
_COMMUTATIVE = ("add", "mul")
_IGNORED_ARGUMENTS = ("cudnn_enable", "alpha_is_one")
_SYNONYMS = {
    "mm": "matmul",
    "bmm": "matmul",
    "_to_copy": "to",
    "special_erf": "erf",
    "_softmax": "softmax",
    "clip": "clamp",
    "view": "reshape",
    "_unsafe_view": "reshape",
}


@dataclass(frozen=True)
class Match:
    """Operands by name (attribute access gives fake tensors or Python values) and the matched nodes, root first.

    ``nodes`` holds what was looked through between matched operators too; ``aliases`` are other names of an operand.
    """

    rule: Rule
    spelling: int
    root: fx.Node
    operands: dict[str, Any]
    nodes: tuple[fx.Node, ...] = field(default=())
    aliases: tuple[fx.Node, ...] = field(default=())
    places: dict[str, tuple[Place, ...]] = field(default_factory=dict)  # operand → the arguments that it stands in

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in self.operands:
            raise RuleError(f"rule {self.rule.name}: the pattern has no operand {name!r}")
        value = self.operands[name]
        return value.meta.get("val") if isinstance(value, fx.Node) else value

    def node(self, name: str) -> fx.Node | None:
        """The graph node that an operand is bound to, or None for a number or a missing operand."""
        value = self.operands.get(name)
        return value if isinstance(value, fx.Node) else None

    def is_frozen(self, name: str) -> bool:
        """Whether an operand is a weight: computed from Parameters and constants alone."""
        node = self.node(name)
        return node is not None and bool(node.meta.get("fxquant_frozen", False))

    def is_read_elsewhere(self, name: str) -> bool:
        """Whether something beside the matched operators reads an operand: a tied weight, a shared norm."""
        node = self.node(name)
        return node is not None and any(user not in self.nodes for user in node.users)

    def data(self, name: str) -> Tensor | None:
        """The value of a vector that a calibration handed over, or None."""
        node = self.node(name)
        return None if node is None else node.meta.get("fxquant_value")

    def is_computed_in(self, dtype: torch.dtype) -> bool:
        """Whether every matched value has this dtype; in an autocast region it may differ from that of the operands."""
        return all(node.meta["val"].dtype == dtype for node in self.nodes)


def apply(rules: tuple[Rule, ...], gm: fx.GraphModule) -> list[Event]:
    """Fire every rule wherever it matches, in graph order; each node is looked at by the rules in their order."""
    events: list[Event] = []
    index = _rules_by_root(rules)
    gone: set[fx.Node] = set()
    for node in list(gm.graph.nodes):
        for rule, spelling in index.get(_op_name(node), ()):
            match = match_at(rule, spelling, node) if node not in gone else None
            if match is None:
                continue
            event = _try(match, gone)
            events.append(event)
            if isinstance(event, Fired) or rule.rewrite is None:
                break
    gm.graph.lint()
    gm.recompile()
    return _without_repeats(events)


def _try(match: Match, gone: set[fx.Node]) -> Event:
    """Fire a match, or leave the site as it is with a reason; a rule that fails costs nothing but its own site."""
    rule = match.rule
    try:
        sentence = refusal(match)
        if sentence is None and rule.reweights:
            changes = changes_of(match)
            sentence = changes.misfit()
            if sentence is None:
                reweight([changes])
                forget_vectors(match)
                return Fired(rule, match.root.name)
        elif sentence is None and rule.rewrite is not None:
            body = trace_rewrite(match)
            sentence = misfit(match.root, body)
            if sentence is None:
                forget_vectors(match)
                gone.update(insert(match, body))
                return Fired(rule, match.root.name)
    except DYNAMO_CONTROL_FLOW:
        raise
    except Exception as error:
        sentence = failure(rule, error)
    return Refused(rule, match.root.name, sentence or "it is only named")


def failure(rule: Rule, error: Exception) -> str:
    """The sentence of a rule that raised."""
    problem = (str(error).strip().splitlines() or ["no message"])[0]
    return f"the rule {rule.name} failed here: {type(error).__name__}: {problem}"


def forget_vectors(match: Match) -> None:
    """A vector serves one firing: the result must not match again."""
    for node in match.nodes:
        node.meta.get("fxquant_vectors", {}).pop(match.rule.name, None)


def refusal(match: Match) -> str | None:
    """Why a match must not be rewritten, or None."""
    sentence = own_refusal(match)
    if sentence is None and any(user not in match.nodes for node in match.nodes[1:] for user in node.users):
        sentence = READ_ELSEWHERE
    return sentence or barrier(match)


def own_refusal(match: Match) -> str | None:
    """Why a match must not be rewritten whatever reads its inner values, or None."""
    if any("val" not in node.meta for node in (*match.nodes, *filter(None, map(match.node, match.operands)))):
        return UNKNOWN_VALUE
    for sentence, holds in match.rule.precondition(match):
        if not holds:
            return sentence
    return None


def match_at(rule: Rule, spelling: int, node: fx.Node) -> Match | None:
    """The match of one spelling of a rule with its root at a node, or None."""
    pattern = _trace(rule.all_spellings[spelling])
    state = _State({}, {}, (), (), views=rule.joint and rule.reweights)
    if not _unify(pattern.root, node, state):
        return None
    nodes = tuple(sorted({*state.nodes.values(), *state.passed}, reverse=True))
    vectors = _vectors(rule, nodes)
    if vectors is None:
        return None
    operands = {name: state.operands.get(name) for name in pattern.parameters}
    operands = {**dict.fromkeys(_parameters(rule)), **operands, **vectors}
    aliases = tuple(alias for alias in state.aliases if alias not in nodes)
    return Match(rule, spelling, node, operands, nodes, aliases, _places(state) if rule.reweights else {})


def _vectors(rule: Rule, nodes: tuple[fx.Node, ...]) -> dict[str, fx.Node] | None:
    """What a calibration handed over to this rule at one of the nodes; None where it lacks something."""
    if not rule.vectors:
        return {}
    given = [node.meta.get("fxquant_vectors", {}).get(rule.name, {}) for node in nodes]
    found = {name: vector for held in reversed(given) for name, vector in held.items()}
    return found if set(rule.vectors) <= set(found) else None


def _places(state: "_State") -> dict[str, tuple[Place, ...]]:
    """Every argument of a matched node that is an operand, also one that is left out."""
    found: dict[str, tuple[Place, ...]] = {}
    for pattern, node in state.nodes.items():
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        names = [a.name for a in node.target._schema.arguments if a.name not in _IGNORED_ARGUMENTS]
        for argument, (left, right) in zip(names, _line_up(pattern, node) or (), strict=True):
            inputs = pattern.all_input_nodes if _op_name(node) in _COMMUTATIVE else [left]
            for source in inputs:
                is_operand = isinstance(source, fx.Node) and source.op == "placeholder"
                if is_operand and state.operands.get(str(source.target)) is right:
                    name = str(source.target)
                    found[name] = (*found.get(name, ()), Place(node, argument))
    return found


@dataclass
class _State:
    operands: dict[str, Any]
    nodes: dict[fx.Node, fx.Node]  # pattern node → graph node
    passed: tuple[fx.Node, ...]  # looked through between two matched nodes
    aliases: tuple[fx.Node, ...]  # looked through to see that two values are one operand
    views: bool = False  # whether views that keep the channels last are looked through too

    def copy(self) -> "_State":
        return _State(dict(self.operands), dict(self.nodes), self.passed, self.aliases, self.views)

    def take(self, other: "_State") -> None:
        self.operands, self.nodes, self.passed, self.aliases = other.operands, other.nodes, other.passed, other.aliases


@dataclass(frozen=True)
class _Pattern:
    root: fx.Node
    parameters: tuple[str, ...]


@functools.cache
def _trace(spelling: Callable[..., Any]) -> _Pattern:
    graph = fx.Tracer().trace(spelling)
    parameters = tuple(str(node.target) for node in graph.nodes if node.op == "placeholder")
    root = graph.find_nodes(op="output")[0].args[0]
    if not isinstance(root, fx.Node):
        raise RuleError(f"{spelling.__module__}: the pattern {spelling.__name__} returns no tensor")
    return _Pattern(root, parameters)


@functools.cache
def _parameters(rule: Rule) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for s in rule.all_spellings for name in _trace(s).parameters))


@functools.cache
def _rules_by_root(rules: tuple[Rule, ...]) -> dict[str, tuple[tuple[Rule, int], ...]]:
    index: dict[str, list[tuple[Rule, int]]] = {}
    for rule in rules:
        for spelling, function in enumerate(rule.all_spellings):
            index.setdefault(_op_name(_trace(function).root), []).append((rule, spelling))
    return {name: tuple(found) for name, found in index.items()}


def _op_name(node: fx.Node) -> str:
    """The operator's bare name, the same for a pattern's torch function and the graph's ATen overload."""
    target = node.target
    if node.op == "call_method":
        name = {"float": "to"}.get(str(target), str(target))
    elif isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.partition("::")[2]
    elif node.op == "call_function":
        named = [name for call, name in _OPERATORS.items() if call is target]
        name = named[0] if named else str(getattr(target, "__name__", "?"))
    else:
        return node.op
    return _SYNONYMS.get(name, name)


def _unify(pattern: Any, value: Any, state: _State) -> bool:
    if isinstance(pattern, fx.Node):
        if pattern.op == "placeholder":
            return _bind(str(pattern.target), value, state)
        if not isinstance(value, fx.Node):
            return False
        inner, passed = look_through(value, state.views)
        state.passed += passed
        return _unify_node(pattern, inner, state)
    if isinstance(pattern, (list, tuple)):
        if not isinstance(value, (list, tuple)) or len(pattern) != len(value):
            return False
        return all(_unify(p, v, state) for p, v in zip(pattern, value, strict=True))
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    return _same_constant(pattern, value)


def _bind(name: str, value: Any, state: _State) -> bool:
    if name not in state.operands:
        state.operands[name] = value
        return True
    known = state.operands[name]
    if isinstance(known, fx.Node) and isinstance(value, fx.Node):
        (inner, passed), (other, passed_too) = look_through(known), look_through(value)
        state.aliases += (*passed, *passed_too)
        return inner is other
    return not isinstance(known, fx.Node) and not isinstance(value, fx.Node) and _same_constant(known, value)


def _same_constant(a: Any, b: Any) -> bool:
    if isinstance(a, bool) or isinstance(b, bool) or not isinstance(a, (int, float)):
        return type(a) is type(b) and bool(a == b)
    return isinstance(b, (int, float)) and math.isclose(a, b, rel_tol=NUMBER_TOLERANCE, abs_tol=0.0)


def _unify_node(pattern: fx.Node, node: fx.Node, state: _State) -> bool:
    if pattern in state.nodes:
        return state.nodes[pattern] is node
    name = _op_name(pattern)
    if node.op != "call_function" or name != _op_name(node):
        return False
    pairs = _line_up(pattern, node)
    if pairs is None:
        return False
    orders = [pairs]
    if name in _COMMUTATIVE:
        (p0, v0), (p1, v1), *rest = pairs
        orders.append([(p0, v1), (p1, v0), *rest])
    for order in orders:
        trial = state.copy()
        trial.nodes[pattern] = node
        if all(_unify(p, v, trial) for p, v in order):
            state.take(trial)
            return True
    return False


def _line_up(pattern: fx.Node, node: fx.Node) -> list[tuple[Any, Any]] | None:
    """Pairs of pattern and graph arguments by the graph operator's schema; None where they cannot correspond."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return list(zip(pattern.args, node.args, strict=False)) if len(pattern.args) == len(node.args) else None
    wanted, given = list(pattern.args), list(node.args)
    arguments = node.target._schema.arguments
    if pattern.op == "call_method" and pattern.target == "float":
        wanted.append(torch.float32)
    if _op_name(node) == "einsum" and len(wanted) > 2:  # torch.einsum hands its operands over one by one
        wanted = [wanted[0], wanted[1:]]
    if len(wanted) > len(arguments) or any(key not in {a.name for a in arguments} for key in pattern.kwargs):
        return None
    pairs = []
    for i, argument in enumerate(arguments):
        default = argument.default_value if argument.has_default_value() else None
        left = wanted[i] if i < len(wanted) else pattern.kwargs.get(argument.name, default)
        right = given[i] if i < len(given) else node.kwargs.get(argument.name, default)
        if argument.name in _IGNORED_ARGUMENTS:
            continue
        if argument.name.startswith("dim"):
            left, right = _from_front(left, node), _from_front(right, node)
        pairs.append((left, right))
    return pairs


def _from_front(dim: Any, node: fx.Node) -> Any:
    if isinstance(dim, (list, tuple)):
        return [_from_front(d, node) for d in dim]
    source = node.args[0]
    value = source.meta.get("val") if isinstance(source, fx.Node) else None
    is_plain = isinstance(dim, int) and not isinstance(dim, bool) and dim < 0
    return dim + value.dim() if is_plain and isinstance(value, Tensor) else dim


def barrier(match: Match) -> str | None:
    """What stands between the first matched node and the root and forbids to move them together, or None."""
    node = min((*match.nodes, *match.aliases))
    while node is not match.root:
        if node.target is ENTER_AUTOCAST or node.target is EXIT_AUTOCAST:
            return AUTOCAST
        if is_higher_order(node.target) or (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable):
            return WRITTEN
        node = node.next
    return None


def _without_repeats(events: list[Event]) -> list[Event]:
    """One event a rule and node: a refusal is dropped where another spelling of the same rule fired."""
    fired = {(event.rule.name, event.node_name) for event in events if isinstance(event, Fired)}
    kept: dict[tuple[str, str], Event] = {}
    for event in events:
        key = (event.rule.name, event.node_name)
        if isinstance(event, Fired) or (key not in fired and key not in kept):
            kept[key] = event
    return list(kept.values())


def find(rule: Rule, gm: fx.GraphModule) -> Iterator[Match]:
    """Every match of a rule, without rewriting anything."""
    for node in gm.graph.nodes:
        for spelling in range(len(rule.all_spellings)):
            if node.op == "call_function" and (match := match_at(rule, spelling, node)) is not None:
                yield match
