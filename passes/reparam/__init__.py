"""Reparameterize: change weights and graph, keep the function. The order of the rules is the order of these lists.

Folds need nothing but weights; they run if named, as in the option ``reparameterize``. Migrations need vectors of a
calibration: rule → site → operand → tensor, where the site is that of the norm, or of each linear that reads it. What is in
``ON_REQUEST`` approximates, or costs speed: it runs if named.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor, fx

from fxquant._compat import FakeTensorMode, maybe_fake_mode
from fxquant.binding import add_input
from fxquant.capture import remove_dead_code
from fxquant.errors import RuleError
from fxquant.passes.channels import look_through
from fxquant.passes.joint import NONLINEAR, RESIDUAL, apply_rules, why_not
from fxquant.passes.match import find
from fxquant.passes.reparam import (
    attention_scale,
    exponent_shift,
    half_octaves,
    input_shift,
    layer_scale,
    low_rank,
    norm_affine,
    norm_scale,
    one_scale,
    query_key_product,
    rep_batch_norm,
    rotary_scale,
    rotation,
    smooth,
    spectral_norm,
    value_rotation,
    value_scale,
)
from fxquant.passes.reparam.stream import rotate_streams
from fxquant.passes.rule import BOUNDED, Event, Refused, Rule

Vectors = Mapping[str, Mapping[str, Mapping[str, Tensor]]]

FOLDS: tuple[Rule, ...] = (
    *norm_scale.RULES,
    layer_scale.RULE,
    rep_batch_norm.RULE,
    spectral_norm.RULE,
    input_shift.RULE,
    attention_scale.RULE,
    norm_affine.RULE,
)
MIGRATIONS: tuple[Rule, ...] = (
    one_scale.RULE,
    exponent_shift.RULE,
    smooth.RULE,
    value_scale.RULE,
    rotary_scale.RULE,
    value_rotation.RULE,
    rotation.RULE,
)
ON_REQUEST: tuple[Rule, ...] = (low_rank.RULE, query_key_product.RULE, half_octaves.RULE)
REPARAMS: tuple[Rule, ...] = (*FOLDS, *MIGRATIONS, *ON_REQUEST)
# These hold for the weights of one layer alone; every other rule keeps the function whatever vectors and weights it gets.
APPROXIMATIONS = frozenset(rule.name for rule in REPARAMS if rule.vectors and rule.error_class == BOUNDED)
NO_NORM = "no norm stands before this linear: what writes its input cannot take up a vector"
OTHER = "the graph around this site is not the one that the rule is written for"


def reparameterize(
    gm: fx.GraphModule, sites: Mapping[str, fx.Node], vectors: Vectors, names: Iterable[str] = ()
) -> list[Event]:
    """Apply the folds that are named, and every rule that vectors are given for; returns what fired and what was refused.

    Vectors become graph inputs before the user's own (``vector_inputs`` gives their values). A site that the graph does not
    have is passed over: it may be in another graph of the model.
    """
    wanted = {*names, *vectors}
    unknown = wanted - {rule.name for rule in REPARAMS}
    if unknown:
        raise RuleError(f"no reparameterization is called {sorted(unknown)}; known: {sorted({r.name for r in REPARAMS})}")
    before = set(gm.graph.nodes)
    made = _hand_over(gm, sites, vectors)
    events: list[Event] = []
    for rule in REPARAMS:
        if rule is rotation.RULE:
            events += rotate_streams(gm) if rule.name in wanted else []
        elif rule.name in wanted:
            events += apply_rules((rule,), gm)
    events += _left_over(gm)
    for node in made:
        if not node.users:
            gm.graph.erase_node(node)
    remove_dead_code(gm.graph)
    _mark_folded(gm.graph, before)
    gm.recompile()
    return events


def vector_inputs(graph: fx.Graph) -> list[Tensor]:
    """The values of the inputs that reparameterize added, in order: the graph reads them before the user's own."""
    return [node.meta["fxquant_value"] for node in graph.find_nodes(op="placeholder") if "fxquant_value" in node.meta]


def _hand_over(gm: fx.GraphModule, sites: Mapping[str, fx.Node], vectors: Vectors) -> list[fx.Node]:
    """A graph input for every vector, noted at the node of its site; equal tensors share one."""
    rules, made = {rule.name: rule for rule in REPARAMS}, dict[int, fx.Node]()
    for name, by_site in vectors.items():
        for site, operands in by_site.items():
            if set(operands) != set(rules[name].vectors):
                raise RuleError(f"{site}: {name} takes the vectors {rules[name].vectors}, not {sorted(operands)}")
            if site not in sites:
                continue
            for operand, value in operands.items():
                if id(value) not in made:
                    made[id(value)] = _input(gm.graph, f"{name}_{operand}_{len(made)}", value)
            given = {operand: made[id(value)] for operand, value in operands.items()}
            sites[site].meta.setdefault("fxquant_vectors", {})[name] = given
    return list(made.values())


def _input(graph: fx.Graph, name: str, value: Tensor) -> fx.Node:
    inputs = graph.find_nodes(op="placeholder")
    fake_mode = maybe_fake_mode([node.meta.get("val") for node in inputs])
    if not isinstance(fake_mode, FakeTensorMode):
        raise RuleError("the graph has no fake tensors: it was not captured")
    node = add_input(graph, name, value, fake_mode)
    node.meta |= {"fxquant_frozen": True, "fxquant_value": value}
    return node


def _mark_folded(graph: fx.Graph, before: set[fx.Node]) -> None:
    """Set ``meta["fxquant_folded"]`` on vectors, on what rules computed from weights alone, and on what follows from it."""
    for node in graph.nodes:
        is_new = node not in before or any(source.meta.get("fxquant_folded") for source in node.all_input_nodes)
        if is_new and node.op in ("placeholder", "call_function") and node.meta.get("fxquant_frozen"):
            node.meta["fxquant_folded"] = True


def _left_over(gm: fx.GraphModule) -> list[Event]:
    """A refusal for every vector of a site that its rule did not even match."""
    rules, found = {rule.name: rule for rule in REPARAMS}, list[Event]()
    given = {node: list(held) for node in gm.graph.nodes if (held := node.meta.get("fxquant_vectors"))}
    for name in {name for names in given.values() for name in names}:
        matched = {node for match in find(rules[name], gm) for node in match.nodes}
        lost = [node for node, names in given.items() if name in names and node not in matched]
        found += [Refused(rules[name], node.name, _diagnosis(node)) for node in lost]
    for node in given:
        del node.meta["fxquant_vectors"]
    return found


def _diagnosis(node: fx.Node) -> str:
    """What stands where a rule wants something else."""
    if "layer_norm" in str(node.target) or "rms_norm" in str(node.target):
        readers = [sentence for user in node.users if (sentence := why_not(user)) in (RESIDUAL, NONLINEAR)]
        return readers[0] if readers else OTHER
    source = node.args[0] if node.args else None
    if "linear" not in str(node.target) or not isinstance(source, fx.Node):
        return OTHER
    sentence = why_not(look_through(source)[0])
    return {RESIDUAL: NO_NORM, NONLINEAR: NONLINEAR}.get(sentence, OTHER)
