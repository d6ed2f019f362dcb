"""The shared rule test: everything that is asked of a rule, with no test written by hand.

1. the proof closes; 2. both sides agree in float64 on drawn magnitudes; 3. it fires once and never on its own output;
4. every sentence of the precondition has a near miss, refused for that very sentence; 5. an intermediate value that is
read elsewhere stops it; 6. the rewritten graph equals eager mode.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxquant._compat import make_fx
from fxquant.passes.joint import apply_rules
from fxquant.passes.match import READ_ELSEWHERE
from fxquant.passes.rule import ALGEBRA, Fired, Refused, Rule, Sizes, size_of

SIZES = {"b": 3, "h": 2, "n": 5, "m": 5, "k": 4, "d": 4, "e": 4, "r": 3, "g": 2, "one": 1}
TIED = "tied"  # a near miss: an operand that something else reads too


def assert_rule(rule: Rule) -> None:
    """Judge a rule by its own facts.

    Raises:
        AssertionError: with the rule, the spelling and what does not hold.
    """
    for spelling in range(len(rule.all_spellings)):
        where = f"{rule.name}, spelling {spelling}"
        operands = draw(rule, spelling, torch.float32)
        gm, call = build_graph(rule, spelling, operands)
        events = apply_rules((rule,), gm)
        if rule.rewrite is None:
            assert [type(e) for e in events] == [Refused], f"{where}: {events}"
            continue
        assert [type(e) for e in events] == [Fired], f"{where}: does not fire: {[getattr(e, 'sentence', e) for e in events]}"
        again = apply_rules((rule,), gm)
        assert not any(isinstance(e, Fired) for e in again), f"{where}: fires on its own output"
        _assert_agree(rule, gm(*_tensors(operands)), call(*_tensors(operands)), operands, 2e-5, where)
        _assert_same_in_float64(rule, spelling, where)
        _assert_stopped_by_a_reader(rule, spelling, where)
        if rule.proof is ALGEBRA:
            from fxquant.passes.symbolic import prove

            assert prove(rule, spelling), f"{where}: the algebra does not close"
    assert rule.proof is not None, f"{rule.name}: has no proof"
    _assert_near_misses(rule)


def draw(rule: Rule, spelling: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> dict[str, Any]:
    """Operands of one spelling: tensors by the rule's shapes, scalars by its samples."""
    names = (*arguments(rule.all_spellings[spelling]), *rule.vectors)
    generator = torch.Generator().manual_seed(seed)
    operands: dict[str, Any] = {}
    for name in names:
        sample = rule.samples.values.get(name)
        if name in rule.shapes:
            value = torch.randn(_sizes(rule.shapes[name]), generator=generator, dtype=torch.float64) * scale
            operands[name] = _drawn(value, str(sample), dtype)
            if name in rule.frozen or name in rule.vectors:
                operands[name] = Frozen(operands[name])
        elif isinstance(sample, Sizes):
            operands[name] = _sizes(sample)
        elif callable(sample) and not isinstance(sample, torch.dtype):
            operands[name] = sample(SIZES)
        else:
            operands[name] = dtype if sample is torch.float32 else sample
    return operands


def arguments(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a function's parameters."""
    code = function.__code__
    return code.co_varnames[: code.co_argcount]


def _drawn(value: Tensor, sample: str, dtype: torch.dtype) -> Any:
    """A drawn tensor as the samples say: a mask, positive, whole numbers or orthonormal columns."""
    if sample == "finite":
        return Finite(value)
    if sample == "boolean":
        return value > 0
    if sample == "positive":
        value = torch.exp(value.clamp(-2, 2))
    elif sample == "pairs":  # both halves of every four features are the same
        first = torch.exp(value.clamp(-2, 2)).reshape(-1, 2, 2)[:, :1]
        value = torch.cat([first, first], 1).flatten()
    elif sample == "integer":
        value = torch.round(value.clamp(-3, 3))
    elif sample == "orthonormal":
        value = torch.linalg.qr(value)[0]
    return value.to(dtype)


class Frozen:
    """A tensor operand that stands for a weight."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Finite:
    """A tensor operand computed in the graph in a way that is provably finite: 0 or -1000."""

    def __init__(self, value: Tensor) -> None:
        self.value = value > 0


def build_graph(
    rule: Rule, spelling: int, operands: Mapping[str, Any], also: int | None = None, tied: str | None = None
) -> tuple[fx.GraphModule, Callable[..., Any]]:
    """The normal-form graph of a spelling over tensor operands.

    ``also`` returns that inner value too, ``tied`` that operand.
    """
    fixed = {n: v for n, v in operands.items() if not isinstance(v, (Tensor, Frozen, Finite))}
    named = {n: v for n, v in operands.items() if n not in fixed}

    def call(*values: Tensor) -> Any:
        given = {}
        for (name, operand), value in zip(named.items(), values, strict=True):
            if name not in rule.vectors:
                given[name] = torch.where(value, 0.0, -1000.0) if isinstance(operand, Finite) else value
        return rule.all_spellings[spelling](**fixed, **given)

    gm = make_fx(call, pre_dispatch=True, tracing_mode="fake")(*_tensors(operands))
    gm.graph.eliminate_dead_code()
    for node, operand in zip(gm.graph.find_nodes(op="placeholder"), named.values(), strict=True):
        node.meta["fxquant_frozen"] = isinstance(operand, Frozen)
    _hand_over(rule, gm, named)
    if tied is not None:
        output = gm.graph.find_nodes(op="output")[0]
        output.args = ((output.args[0], gm.graph.find_nodes(op="placeholder")[list(named).index(tied)]),)
        gm.recompile()
    if also is not None:
        output = gm.graph.find_nodes(op="output")[0]
        inner = [n for n in gm.graph.nodes if n.op == "call_function" and n not in output.all_input_nodes]
        output.args = ((output.args[0], inner[also]),)
        gm.recompile()
    return gm, call


def _hand_over(rule: Rule, gm: fx.GraphModule, named: Mapping[str, Any]) -> None:
    """The vectors of a calibration, at the root of the pattern."""
    inputs = dict(zip(named, gm.graph.find_nodes(op="placeholder"), strict=True))
    for name in rule.vectors:
        inputs[name].meta["fxquant_value"] = named[name].value
    root = gm.graph.find_nodes(op="output")[0].all_input_nodes[0]
    root.meta["fxquant_vectors"] = {rule.name: {name: inputs[name] for name in rule.vectors}}


def _tensors(operands: Mapping[str, Any]) -> list[Tensor]:
    values = [v.value if isinstance(v, (Frozen, Finite)) else v for v in operands.values()]
    return [v for v in values if isinstance(v, Tensor)]


def _sizes(shape: str) -> list[int]:
    return [size_of(name, SIZES) for name in shape.split()]


def _assert_agree(rule: Rule, a: Tensor, b: Tensor, operands: Mapping[str, Any], tolerance: float, where: str) -> None:
    """Both sides are the same, or as close as the rule's bound says."""
    if rule.proof is None or rule.proof.holds is None:
        return _assert_same(a, b, tolerance, where)
    plain = {name: _plain(value) for name, value in operands.items()}
    assert rule.proof.holds(b, a, plain), f"{where}: the bound does not hold"
    return None


def _assert_same(a: Tensor, b: Tensor, tolerance: float, where: str) -> None:
    error = (a - b).abs().max().item() / max(b.abs().max().item(), 1e-30)
    assert error <= tolerance, f"{where}: relative difference {error:.2e}"


def _assert_same_in_float64(rule: Rule, spelling: int, where: str) -> None:
    assert rule.rewrite is not None
    wanted, pattern = arguments(rule.rewrite), rule.all_spellings[spelling]
    for seed, scale in enumerate((rule.samples.scale[0], 1.0, rule.samples.scale[1])):
        operands = draw(rule, spelling, torch.float64, scale, seed)
        plain = {n: _plain(v) for n, v in operands.items()}
        taken = {name: plain[name] for name in arguments(pattern)}
        left = pattern(**taken)
        right = rule.rewrite(**{name: plain.get(name) for name in wanted})
        if rule.reweights:
            right = pattern(**{**taken, **{name: value for name, value in right.items() if name in taken}})
        tolerance = 1e-6 if "gelu" in rule.name else 1e-10
        _assert_agree(rule, right, left, operands, tolerance, f"{where}, magnitude {scale}")


def _plain(value: Any) -> Any:
    if isinstance(value, Finite):
        return torch.where(value.value, 0.0, -1000.0).to(torch.float64)
    return value.value if isinstance(value, Frozen) else value


def _assert_stopped_by_a_reader(rule: Rule, spelling: int, where: str) -> None:
    operands = draw(rule, spelling, torch.float32)
    gm, _ = build_graph(rule, spelling, operands)
    events = apply_rules((rule,), gm)
    inner = [name for event in events if isinstance(event, Fired) for name in [event.node_name]]
    assert inner, where
    fresh, _ = build_graph(rule, spelling, operands)
    computed = [n for n in fresh.graph.nodes if n.op == "call_function"]
    root = fresh.graph.find_nodes(op="output")[0].all_input_nodes[0]
    candidates = [i for i, n in enumerate(n for n in computed if n is not root) if root in n.users]
    for i in candidates:
        read, _ = build_graph(rule, spelling, operands, also=i)
        found = apply_rules((rule,), read)
        if all(isinstance(event, Fired) for event in found):
            continue  # the value read is an operand of the rule, not an intermediate value
        assert [e.sentence for e in found if isinstance(e, Refused)] == [READ_ELSEWHERE], f"{where}: {found}"


def _assert_near_misses(rule: Rule) -> None:
    sentences = _sentences(rule)
    if rule.near_misses:
        assert set(rule.near_misses) == sentences, f"{rule.name}: sentences without a near miss, or the reverse"
    for sentence, override in rule.near_misses.items():
        tied = [name for name, value in override.items() if value is TIED]
        operands = _near_miss(rule, {name: value for name, value in override.items() if value is not TIED})
        gm = _graph_with(rule, operands, *tied)
        events = [e for e in apply_rules((rule,), gm) if isinstance(e, Refused)]
        assert {e.sentence for e in events} == {sentence}, (
            f"{rule.name}: {sentence!r}: refused for {[e.sentence for e in events]}"
        )


def _sentences(rule: Rule) -> set[str]:
    operands = draw(rule, 0, torch.float32)
    gm, _ = build_graph(rule, 0, operands)
    from fxquant.passes.match import find

    match = next(iter(find(rule, gm)))
    return {sentence for sentence, _ in rule.precondition(match)}


def _near_miss(rule: Rule, override: Mapping[str, Any]) -> dict[str, Any]:
    """Operands by an override: a dtype, a shape (``frozen`` before it makes a weight), a number or None."""
    made: dict[str, Any] = {}
    for name, value in override.items():
        if isinstance(value, torch.dtype) and name in rule.shapes:
            sizes = _sizes(rule.shapes[name])
            made[name] = Frozen(torch.ones(sizes).to(value)) if name in rule.frozen else torch.ones(sizes).to(value)
        elif isinstance(value, str) and name in rule.shapes:
            frozen, shape = value.startswith("frozen "), value.removeprefix("frozen ")
            tensor = torch.ones(_sizes(shape))
            made[name] = Frozen(tensor) if frozen else tensor
        elif isinstance(value, str) and name in rule.samples.values and isinstance(rule.samples.values[name], float):
            made[name] = torch.ones(_sizes(value))
        else:
            made[name] = value
        if isinstance(made[name], Tensor) and name in rule.vectors:
            made[name] = Frozen(made[name])
    return made


def _graph_with(rule: Rule, operands: Mapping[str, Any], tied: str | None = None) -> fx.GraphModule:
    """The graph of the first spelling that has all the operands and can be computed with them."""
    for i, spelling in enumerate(rule.all_spellings):
        if set(operands) | ({tied} - {None}) <= {*arguments(spelling), *rule.vectors}:
            try:
                return build_graph(rule, i, {**draw(rule, i, torch.float32), **operands}, tied=tied)[0]
            except RuntimeError:  # this spelling's operator refuses such operands
                continue
    raise AssertionError(f"{rule.name}: no spelling can be computed with the operands {sorted(operands)}")
