"""What the shared rule test cannot see: a rule that fails, values that change under a match, layouts, autocast, vmap."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxquant._compat import DYNAMO_CONTROL_FLOW, make_fx
from fxquant.capture import capture
from fxquant.passes.match import AUTOCAST, UNKNOWN_VALUE, Match, apply
from fxquant.passes.recognise import recognise, silu, softmax
from fxquant.passes.rule import Event, Fired, Refused, Rule

X = torch.linspace(-3, 3, 192).reshape(4, 6, 8)
Q, K, V = (torch.linspace(-1, 1, 240).reshape(2, 3, 5, 8).roll(i) for i in (0, 7, 31))
GAMMA, WEIGHT = torch.linspace(0.5, 2, 8), nn.Parameter(torch.linspace(-1, 1, 40).reshape(8, 5))


def run(function: Callable[..., Any], *args: Any) -> tuple[Tensor, list[Event]]:
    """The result of the recognised graph, and what the rules did."""
    seen: list[Event] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        captured = capture(gm, inputs)
        seen.extend(recognise(captured.gm))
        forward: Callable[..., Any] = captured.gm.forward
        return forward

    with torch.no_grad():
        result: Tensor = torch.compile(function, backend=backend)(*args)
    return result, seen


def check(function: Callable[..., Any], *args: Any, tolerance: float = 1e-5) -> dict[str, str | None]:
    """Rule → refusal (None where it fired), once the recognised graph equals eager mode in values, dtype and strides."""
    with torch.no_grad():
        wanted = function(*args)
    got, events = run(function, *args)
    assert (got.dtype, got.shape, got.stride()) == (wanted.dtype, wanted.shape, wanted.stride())
    assert torch.allclose(got, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)
    return {event.rule.name: getattr(event, "sentence", None) for event in events}


def trace(function: Callable[..., Any], *args: Tensor) -> fx.GraphModule:
    gm: fx.GraphModule = make_fx(function, pre_dispatch=True, tracing_mode="fake")(*args)
    return gm


def gate(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def failing(where: str, error: Exception) -> Rule:
    """The SiLU rule, with a precondition or a rewrite that raises."""

    def precondition(m: Match) -> Iterator[tuple[str, bool]]:
        yield "x must be a tensor", isinstance(m.x, Tensor)
        raise error

    def rewrite(x: Tensor) -> Tensor:
        raise error

    changed: Any = {"precondition": precondition} if where == "precondition" else {"rewrite": rewrite}
    return replace(silu.RULE, **changed)


@pytest.mark.parametrize("where", ["precondition", "rewrite"])
def test_a_rule_that_fails_leaves_its_site_and_only_that(where: str) -> None:
    gm = trace(lambda x: torch.relu(gate(x)) + _softmax(x), X)
    events = apply((failing(where, ValueError("no good\nsecond line")), softmax.RULE), gm)
    assert [type(event) for event in events] == [Refused, Fired]
    assert isinstance(events[0], Refused)
    assert events[0].sentence == "the rule silu failed here: ValueError: no good"
    assert torch.allclose(gm(X), torch.relu(gate(X)) + torch.softmax(X, -1), atol=1e-6)
    assert all(node.users or node.op == "output" for node in gm.graph.nodes)


def _softmax(x: Tensor) -> Tensor:
    e = torch.exp(x - torch.amax(x, -1, True))
    return e / torch.sum(e, -1, True)


@pytest.mark.parametrize("kind", DYNAMO_CONTROL_FLOW)
@pytest.mark.parametrize("where", ["precondition", "rewrite"])
def test_the_exceptions_that_steer_dynamo_pass(where: str, kind: type[Exception]) -> None:
    error = kind.__new__(kind)
    with pytest.raises(kind):
        apply((failing(where, error),), trace(gate, X))


def test_a_rewrite_that_fails_halfway_leaves_no_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = replace(silu.RULE, rewrite=lambda x: torch.relu(torch.abs(x)))
    gm = trace(gate, X)
    before = [node.name for node in gm.graph.nodes]
    copy = fx.Graph.node_copy

    def relu_fails(graph: fx.Graph, node: fx.Node, *args: Any) -> fx.Node:
        if graph is gm.graph and node.target is torch.ops.aten.relu.default:
            raise RuntimeError("half done")
        return copy(graph, node, *args)

    monkeypatch.setattr(fx.Graph, "node_copy", relu_fails)
    (event,) = apply((rule,), gm)
    assert isinstance(event, Refused)
    assert event.sentence == "the rule silu failed here: RuntimeError: half done"
    assert [node.name for node in gm.graph.nodes] == before
    assert torch.equal(gm(X), gate(X))


@pytest.mark.parametrize(
    ("rewrite", "sentence"),
    [
        (lambda x: x.double(), "would change the dtype of the result from torch.float32 to torch.float64"),
        (lambda x: x[:1], "would change the shape of the result from 4×6×8 to 1×6×8"),
        (lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), "would change the memory layout of the result"),
        (lambda x: x * torch.tensor(2.0), "the rewrite makes a constant tensor"),
    ],
)
def test_a_rewrite_must_leave_the_same_kind_of_value(rewrite: Callable[[Tensor], Tensor], sentence: str) -> None:
    gm = trace(gate, X)
    (event,) = apply((replace(silu.RULE, rewrite=rewrite),), gm)
    assert isinstance(event, Refused)
    assert sentence in event.sentence
    assert torch.equal(gm(X), gate(X))


def rms(x: Tensor) -> Tensor:
    return GAMMA * (x * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-5))


@pytest.mark.parametrize("function", [rms, _softmax])
def test_a_permuted_input_keeps_the_layout_that_a_later_view_needs(function: Callable[[Tensor], Tensor]) -> None:
    x = X.transpose(1, 2).contiguous()
    reasons = check(lambda x: function(x.transpose(1, 2)).transpose(1, 2).view(-1), x)
    assert any("memory layout" in str(reason) for reason in reasons.values())


def norm(x: Tensor, gamma: Tensor) -> Tensor:
    top = x - x.mean(-1, True)
    return gamma * (top / torch.sqrt(torch.var(x, -1, correction=0, keepdim=True) + 1e-5)) + gamma


def test_a_norm_with_parameters_of_another_dtype() -> None:
    assert check(norm, X, GAMMA) == {"layer_norm": None}
    for dtype in (torch.float64, torch.bfloat16):
        assert check(norm, X, GAMMA.to(dtype))["layer_norm"] == "γ and β must be float32"


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, divisor: Any = 2.0) -> Tensor:
    scores = q @ k.transpose(-1, -2) / divisor
    return torch.softmax(scores if mask is None else scores + mask, -1) @ v


def test_dropout_that_does_nothing_is_looked_through() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout(torch.softmax(q @ k.transpose(-1, -2) * 0.5, -1), 0.1, training=False) @ v

    assert check(function, Q, K, V)["attention"] is None

    def read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = F.dropout(torch.softmax(q @ k.transpose(-1, -2) * 0.5, -1), 0.1, training=False)
        return weights @ v + weights.sum(-1, keepdim=True)

    assert check(read, Q, K, V)["attention"] == "an intermediate value is read elsewhere"


@pytest.mark.parametrize("short", ["q", "batch"])
def test_a_mask_that_is_larger_than_the_scores(short: str) -> None:
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    q = Q[:, :, :1] if short == "q" else Q[:1]
    k, v = (K, V) if short == "q" else (K[:1], V[:1])
    reasons = check(lambda q, k, v, keep: attend(q, k, v, torch.where(keep, 0.0, -1e3)), q, k, v, mask)
    assert reasons["attention"] == "the mask must not widen the scores"


@pytest.mark.parametrize(
    "make",
    [
        lambda hidden: torch.where(hidden, 0.0, -1e30) * 1e30 * 1e-30,
        lambda hidden: (torch.where(hidden, 3e38, 3e38).tril() - 3e38) * 3,
        lambda hidden: torch.where(hidden, 0.0, 0.0) * 1e60,
        lambda hidden: torch.rsub(torch.where(hidden, 0.0, -3e38), 0.0, alpha=5),
    ],
)
def test_a_mask_that_overflows_on_the_way_is_not_finite(make: Callable[[Tensor], Tensor]) -> None:
    hidden = torch.zeros(5, 5, dtype=torch.bool)
    reasons = check(lambda q, k, v, hidden: attend(q, k, v, make(hidden)), Q, K, V, hidden)
    assert "may hold -inf" in str(reasons["attention"])


def test_a_scale_that_is_no_number_or_zero() -> None:
    assert "ZeroDivisionError" in str(check(lambda q, k, v: attend(q, k, v, divisor=0.0), Q, K, V)["attention"])
    assert "number" in str(check(lambda q, k, v: attend(q, k, v, divisor=q.mean()), Q, K, V)["attention"])

    def contracted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("bhij,bhjd->bhid", torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k) * q.mean(), -1), v)

    assert check(contracted, Q, K, V)["einsum_attention"] == "the scale must be a number"


@pytest.mark.parametrize(("q", "k", "v"), [(Q, K[:, :, :1], V), (Q[..., :1], K, V), (Q, K, V[:, :, :1]), (Q[:1], K, V)])
def test_einsum_repeats_sizes_of_one(q: Tensor, k: Tensor, v: Tensor) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("bhij,bhjd->bhid", torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k), -1), v)

    assert "repeat a size of 1" in str(check(function, q, k, v)["einsum_attention"])
    assert "repeat a size of 1" in str(check(lambda x: torch.einsum("bk,kn->bn", x, WEIGHT), X[0, :, :1])["einsum_linear"])


def under_autocast(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def inside(*args: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return function(*args)

    return inside


def test_a_rewrite_in_an_autocast_region_has_the_dtype_of_the_region() -> None:
    assert check(under_autocast(lambda x: x @ WEIGHT), X, tolerance=0.1) == {"linear": None}
    assert "half precision" in str(check(under_autocast(attend), Q, K, V, tolerance=0.1)["attention"])

    def across(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            inner = torch.erf(x / 2**0.5)
        return x * 0.5 * (1 + inner)

    assert check(across, X)["gelu"] == AUTOCAST


def test_values_inside_vmap_are_not_known() -> None:
    assert check(lambda x: torch.vmap(gate)(x), X) == {"silu": UNKNOWN_VALUE}


def test_a_copy_made_before_a_write_is_another_value() -> None:
    def function(x: Tensor) -> Tensor:
        x = x.clone()
        rows = x.view(4, -1)
        early = rows.to(torch.float32, copy=True)
        x.mul_(2)
        return rows * torch.sigmoid(early)

    assert check(function, X).get("silu", "no match") is not None
