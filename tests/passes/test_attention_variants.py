"""Attention that is no plain softmax(s q kᵀ) v: kept or folded, never swallowed; with the worked numbers of the methods."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fxquant
from fxquant.passes.match import READ_ELSEWHERE
from fxquant.passes.recognise.clipped_attention import RULE as CLIPPED
from fxquant.passes.recognise.gated_attention import GATE
from fxquant.passes.recognise.temperature import _ROWS as ROWS
from fxquant.testing.graphs import Captured, capture_call

Q, K, V = (torch.linspace(-1, 1, 2 * 3 * 5 * 4).reshape(2, 3, 5, 4).roll(i) for i in (0, 7, 31))
TAU = torch.linspace(0.5, 1.5, 5).reshape(1, 1, 5, 1)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])


def check(function: Callable[..., Any], *args: Tensor) -> Captured:
    """The recognised graph, once it equals eager mode."""
    made = capture_call(function, *args)
    assert torch.allclose(made.run(), made.wanted, rtol=1e-5, atol=1e-6)
    return made


def kernels(made: Captured) -> int:
    return made.count("scaled_dot_product_attention")


@pytest.mark.parametrize(
    ("logits", "zeta", "gamma", "wanted"),
    [
        ([4, 1, 0, -2], 1.0, -0.025, [0.932424, 0.022667, 0, 0]),
        ([4, 1, 0, -2], 1.003, -0.003, [0.936676, 0.043784, 0.014211, 0]),
        ([4, 1, 0, -2], 1.1, -0.1, [1, 0, 0, 0]),
        ([2, 1, 0, -3], 1.0, -0.025, [0.653829, 0.224727, 0.066870, 0]),
        ([2, 1, 0, -3], 1.1, -0.1, [0.694727, 0.192364, 0.007555, 0]),
    ],
)
def test_clipped_softmax_is_kept(logits: list[float], zeta: float, gamma: float, wanted: list[float]) -> None:
    """The clipping stands between the softmax and v; with v = 1 the result shows the weights themselves."""

    def attend(x: Tensor, v: Tensor) -> Tensor:
        return torch.clip((zeta - gamma) * torch.softmax(x, -1) + gamma, 0.0, 1.0) @ v

    made = check(attend, torch.tensor([[logits]], dtype=torch.float32), torch.eye(4)[None])
    assert torch.allclose(made.run()[0, 0], torch.tensor(wanted, dtype=torch.float32), atol=1e-5)
    sentence = next(sentence for sentence, _ in CLIPPED.precondition(None))  # type: ignore[arg-type]
    assert made.refusals["clipped_attention"] == sentence
    assert kernels(made) == 0


@pytest.mark.parametrize(("zeta", "gamma", "zero", "one"), [(1.0, -0.025, 0.0243902, None), (1.1, -0.1, 0.1 / 1.2, 0.9166667)])
def test_where_clipped_softmax_is_zero_and_one(zeta: float, gamma: float, zero: float, one: float | None) -> None:
    """Weights of p up to -γ / (ζ - γ) are zero, from (1 - γ) / (ζ - γ) on one: just before and just behind."""
    edges = [edge for edge in (zero, one) if edge is not None]
    p = torch.tensor([edge * (1 + sign * 1e-4) for edge in edges for sign in (-1, 1)], dtype=torch.float64)
    logits = torch.stack([p.log(), (1 - p).log()], -1)[None]

    def attend(x: Tensor, v: Tensor) -> Tensor:
        return torch.clip((zeta - gamma) * torch.softmax(x, -1) + gamma, 0.0, 1.0) @ v

    weights = check(attend, logits, torch.eye(2, dtype=torch.float64)[None]).run()[0, :, 0]
    assert weights[0] == 0
    assert weights[1] > 0
    assert one is None or (weights[2] < 1 and weights[3] == 1)


def test_clipped_softmax_of_real_scores_is_kept() -> None:
    made = check(lambda q, k, v: torch.clamp(torch.softmax(scores(q, k), -1) * 1.06 - 0.03, 0, 1) @ v, Q, K, V)
    assert kernels(made) == 0
    assert made.count("clamp") + made.count("clip") == 1


GATES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "of a head": lambda q, k, v, g: torch.softmax(scores(q, k), -1) @ v * torch.sigmoid(g[..., :1]),
    "of an element": lambda q, k, v, g: F.scaled_dot_product_attention(q, k, v) * torch.sigmoid(g),
    "by token": lambda q, k, v, g: F.scaled_dot_product_attention(q, k, v).transpose(1, 2) * torch.sigmoid(g.transpose(1, 2)),
    "merged": lambda q, k, v, g: (
        F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 12)
        * torch.sigmoid(g.transpose(1, 2).reshape(2, 5, 12))
    ),
}


@pytest.mark.parametrize("gate", GATES)
def test_a_gate_stays_behind_the_attention(gate: str) -> None:
    made = check(GATES[gate], Q, K, V, Q.roll(3) * 3)
    assert made.refusals["gated_attention"] == GATE
    assert kernels(made) == made.count("sigmoid") == 1


def test_gate_worked_example() -> None:
    logits, o = torch.tensor([[[[0.0], [-2.0]]]]), torch.tensor([[[[1.0, 2], [3, 4]]]])
    far = torch.eye(2)[None, None] * 200  # each query sees its own value alone

    def attend(q: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, v) * torch.sigmoid(g)

    made = check(attend, far, o, logits)
    assert torch.allclose(made.run()[0, 0], torch.tensor([[0.5, 1.0], [0.357609, 0.476812]]), atol=1e-5)


TEMPERATURES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "factor of the scores": lambda q, k, v, t: torch.softmax(scores(q, k) * t, -1) @ v,
    "factor before the scale": lambda q, k, v, t: torch.softmax((q @ k.transpose(-2, -1)) * t, -1) @ v,
    "quotient": lambda q, k, v, t: torch.softmax(scores(q, k) / t, -1) @ v,
    "factor of q": lambda q, k, v, t: torch.softmax(scores(q * t, k), -1) @ v,
    "factor of v too": lambda q, k, v, t: torch.softmax(scores(q, k) * t, -1) @ (v * t),
    "beside a mask": lambda q, k, v, t: torch.softmax(scores(q, k) * t + torch.ones(5, 5).triu(1) * -1e4, -1) @ v,
    "one number": lambda q, k, v, t: torch.softmax(scores(q, k) / 0.8, -1) @ v,
}


@pytest.mark.parametrize("place", TEMPERATURES)
def test_a_temperature_of_rows_moves_into_q(place: str) -> None:
    made = check(TEMPERATURES[place], Q, K, V, TAU)
    assert kernels(made) == 1
    assert made.count("softmax") == 0


def test_a_temperature_of_keys_is_kept() -> None:
    made = check(lambda q, k, v, t: torch.softmax(scores(q, k) * t.transpose(-2, -1), -1) @ v, Q, K, V, TAU)
    assert made.refusals["temperature"] == ROWS
    assert kernels(made) == 0


def test_ssa_position_term() -> None:
    """tau(x_i) = tanh(f(x_i)) + 1 + σ(a) log i with f = 0 and a = 0 (log i: unconfirmed, one re-implementation)."""
    position = torch.tensor([1.0, 2, 16]).reshape(3, 1)

    def attend(q: Tensor, k: Tensor, v: Tensor, i: Tensor, a: Tensor) -> Tensor:
        tau = torch.tanh(torch.zeros_like(i)) + 1 + torch.sigmoid(a) * torch.log(i)
        return torch.softmax(scores(q, k) * tau, -1) @ v

    made = check(attend, Q[..., :3, :], K, V, position, torch.zeros(1))
    assert kernels(made) == 1
    tau = 1 + 0.5 * torch.log(position)
    assert torch.allclose(tau.flatten(), torch.tensor([1, 1.346574, 2.386294]), atol=1e-6)
    assert torch.allclose(made.run(), F.scaled_dot_product_attention(Q[..., :3, :] * tau, K, V), atol=1e-6)


@pytest.mark.parametrize(("keys", "wanted"), [(1024, 0.912871), (16384, 1.080123)])
def test_the_scale_of_variable_sizes_goes_into_the_operator(keys: int, wanted: float) -> None:
    """sqrt(log_T N / d) with T = 4096 training keys."""
    factor = math.sqrt(math.log(keys, 4096))
    assert factor == pytest.approx(wanted, abs=1e-6)
    made = check(lambda q, k, v: torch.softmax(q @ k.transpose(-2, -1) * (factor / 2), -1) @ v, Q, K, V)
    assert made.node("scaled_dot_product_attention").kwargs["scale"] == pytest.approx(wanted / 2, abs=1e-6)


def test_ape_keeps_the_scores_that_are_merged_by_their_sums() -> None:
    """Two attentions merged by the logarithms of their sums; a kernel that hides the scores would lose these."""
    t = s = 0.9

    def ape(q: Tensor, kc: Tensor, vc: Tensor, ko: Tensor, vo: Tensor) -> Tensor:
        context, own = scores(q, kc) / t, scores(q, ko)
        o_c, o_o = torch.softmax(context, -1) @ vc, torch.softmax(own, -1) @ vo
        sums = [torch.logsumexp(context, -1, True) * s * t, torch.logsumexp(own, -1, True)]
        w = torch.softmax(torch.cat(sums, -1), -1)
        return w[..., :1] * o_c + w[..., 1:] * o_o

    values = ([[1, 2]], [[1, 0], [0, 1]], [[1], [2]], [[1, 1]], [[5]])
    made = check(ape, *(torch.tensor(value, dtype=torch.float32)[None] for value in values))
    assert made.run().item() == pytest.approx(3.783487, abs=1e-5)
    assert kernels(made) == 0
    assert made.refusals["attention"] == READ_ELSEWHERE


@pytest.mark.parametrize("scheme", ["float", "w8a8"])
def test_clipped_softmax_between_linears_compiles_and_keeps_its_exact_zeros(scheme: str) -> None:
    """Qualcomm's clipped softmax in a module: neither swallowed by a kernel of attention nor lost by quantizing beside it."""

    class Clipped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (torch.nn.Linear(16, 16) for _ in range(3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            p = torch.softmax(4 * scores(self.q(x), self.k(x)), -1)
            p = torch.clip(1.2 * p - 0.1, 0.0, 1.0)
            return p, p @ self.v(x)

    torch.manual_seed(0)
    model, x = Clipped().eval(), torch.randn(2, 9, 16) * 3
    chosen: dict[str, Any] = {"scheme": scheme, "codegen": "ops"}
    with torch.no_grad():
        fast = torch.compile(model, backend="fxquant", options=chosen)
        (p, y), (wanted_p, wanted) = fast(x), model(x)
    assert 0 < int((wanted_p == 0).sum()) < p.numel()
    assert float(((p == 0) == (wanted_p == 0)).float().mean()) > 0.95
    assert float((y - wanted).norm() / wanted.norm()) < (1e-5 if scheme == "float" else 0.05)
    kinds = [(row.kind, row.scheme is None) for row in fxquant.report(fast).sites]
    assert kinds.count(("linear", scheme == "float")) == 3
    assert not any(kind.startswith("attention") for kind, _ in kinds)
