"""Fires a rule for all readers of a value, or for none.

A channel scale may leave a norm only if every reader of the norm takes it up. A joint rule is written for one reader; its
matches that share an operator form a group. What else reads the shared value is named in the refusal.
"""

from torch import fx

from fxquant._compat import DYNAMO_CONTROL_FLOW
from fxquant.passes.match import (
    READ_ELSEWHERE,
    Match,
    apply,
    barrier,
    failure,
    find,
    forget_vectors,
    own_refusal,
)
from fxquant.passes.replace import insert, misfit, trace_rewrite
from fxquant.passes.reweight import changes_of, disagreement, reweight
from fxquant.passes.rule import Event, Fired, Refused, Rule

RESIDUAL = "an add reads the value too: it is carried on as a residual, which a channel scale would change"
NONLINEAR = "a nonlinearity reads the value too: a channel scale does not pass through it"
PARTNER = "another operator that reads the same value cannot follow: "
_ADDS = ("aten::add", "aten::sub")
_NONLINEAR = (
    "gelu",
    "silu",
    "relu",
    "sigmoid",
    "tanh",
    "softmax",
    "exp",
    "softplus",
    "mish",
    "hardswish",
    "layer_norm",
    "rms_norm",
)


def apply_rules(rules: tuple[Rule, ...], gm: fx.GraphModule) -> list[Event]:
    """Fire every rule wherever it matches, one rule after another."""
    events: list[Event] = []
    for rule in rules:
        events += apply_jointly(rule, gm) if rule.joint else apply((rule,), gm)
    return events


def apply_jointly(rule: Rule, gm: fx.GraphModule) -> list[Event]:
    """Fire a joint rule for every group of its matches that can all fire."""
    matches = {match.root: match for match in find(rule, gm)}
    events = [event for group in _groups(list(matches.values())) for event in _try_together(rule, group)]
    gm.graph.lint()
    gm.recompile()
    return events


def why_not(reader: fx.Node) -> str:
    """The sentence for a reader that stands outside of every match."""
    name = str(getattr(reader.target, "_schema", reader).name)
    if name.startswith(_ADDS):
        return RESIDUAL
    return NONLINEAR if name.partition("::")[2] in _NONLINEAR else READ_ELSEWHERE


def _groups(matches: list[Match]) -> list[list[Match]]:
    """Matches that share an operator stand in one group."""
    groups: list[list[Match]] = []
    for match in matches:
        touching = [group for group in groups if any(set(match.nodes) & set(other.nodes) for other in group)]
        groups = [group for group in groups if group not in touching]
        groups.append([other for group in touching for other in group] + [match])
    return groups


def _try_together(rule: Rule, group: list[Match]) -> list[Event]:
    try:
        sentences = [own_refusal(match) or barrier(match) for match in group]
        known = next(filter(None, sentences), None)
        if known is not None:
            return [Refused(rule, m.root.name, own or PARTNER + known) for m, own in zip(group, sentences, strict=True)]
        sentence = _outside(group) or _rewrite(rule, group)
    except DYNAMO_CONTROL_FLOW:
        raise
    except Exception as error:
        sentence = failure(rule, error)
    if sentence is not None:
        return [Refused(rule, match.root.name, sentence) for match in group]
    return [Fired(rule, match.root.name) for match in group]


def _outside(group: list[Match]) -> str | None:
    inside = {node for match in group for node in match.nodes}
    inner = inside - {match.root for match in group}
    readers = sorted({user for node in inner for user in node.users if user not in inside})
    return why_not(readers[0]) if readers else None


def _rewrite(rule: Rule, group: list[Match]) -> str | None:
    """Rewrite every match of a group; why it cannot be done, before anything was changed, or None."""
    if rule.reweights:
        changes = [changes_of(match) for match in group]
        sentence = next(filter(None, (change.misfit() for change in changes)), None) or disagreement(changes)
        if sentence is None:
            reweight(changes)
    else:
        bodies = [trace_rewrite(match) for match in group]
        sentence = next(filter(None, map(misfit, (m.root for m in group), bodies)), None)
        for match, body in zip(group, bodies, strict=True) if sentence is None else ():
            insert(match, body)
    if sentence is None:
        for match in group:
            forget_vectors(match)
    return sentence
