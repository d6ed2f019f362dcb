"""Sigmoid attention, forward and backward, on every instruction set: worked examples, float64, masks, finite differences."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fxquant
import fxquant.ops
from fxquant.config import ISAS
from fxquant.reference.sigmoid_attention import sigmoid_attention
from fxquant.testing.kernels import LEVELS, at_most

assert fxquant.ops.LIBRARY is not None
OP = torch.ops.fxquant.sigmoid_attention
Q = torch.tensor([[1.0, 0], [0, 1], [1, 1]])
K = torch.tensor([[1.0, 0], [0, 2], [-1, 1]])
V = torch.tensor([[1.0, 2], [3, 4], [5, 6]])
SCALE, BIAS = 1 / math.sqrt(2), -math.log(3)
every_isa = pytest.mark.parametrize("isa", LEVELS, ids=lambda isa: str(ISAS[isa]))


def heads(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, *sizes, dtype=dtype, requires_grad=True)


@every_isa
def test_worked_examples(isa: int) -> None:
    slopes = torch.tensor([0.5])
    with at_most(isa):
        full = OP(Q, K, V, None, None, SCALE, BIAS, False)
        causal = OP(Q, K, V, None, None, SCALE, BIAS, True)
        alibi = OP(Q[None], K[None], V[None], None, slopes, SCALE, BIAS, False)[0]
        ones = torch.ones(3, 2)
        dq, dk, dv = torch.ops.fxquant.sigmoid_attention_backward(ones, Q, K, V, None, None, SCALE, BIAS, False)
    wanted = {
        "full": (full, [[1.8591365, 2.6536477], [4.0015303, 5.2331371], [3.3881106, 4.6197174]]),
        "causal": (causal, [[0.4033549, 0.8067099], [1.9847556, 2.8130075], [3.3881106, 4.6197174]]),
        "alibi": (alibi, [[1.1929614, 1.8215079], [3.3569275, 4.3941543], [2.8112590, 3.7144571]]),
        "dq": (dq, [[-0.4324411, 2.7991128], [-1.4741458, 4.2861490], [-0.9478914, 3.8726633]]),
        "dk": (dk, [[1.0210328, 0.9082639], [2.1352055, 2.4142556], [2.4013652, 3.3303011]]),
        "dv": (dv, [[1.0567099] * 2, [1.4065038] * 2, [0.7945112] * 2]),
    }
    for name, (got, numbers) in wanted.items():
        assert torch.allclose(got, torch.tensor(numbers), rtol=2e-6, atol=2e-6), name


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masks", ["none", "causal", "added", "boolean", "alibi"])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (5, 7, 3, 9), (48, 300, 32, 32), (130, 513, 64, 40), (300, 57, 80, 64)], ids=str
)
def test_output_and_gradients_are_float64s(sizes: tuple[int, ...], masks: str, dtype: torch.dtype, isa: int) -> None:
    n, m, d, e = sizes
    q, k, v = heads(n, d, dtype=dtype), heads(m, d, dtype=dtype), heads(m, e, dtype=dtype)
    mask = (
        torch.randn(3, n, m, dtype=dtype) if masks == "added" else torch.rand(2, 1, 1, m) > 0.3 if masks == "boolean" else None
    )
    slopes = torch.tensor([0.1, 0.2, 0.3], dtype=dtype) if masks == "alibi" else None
    settings = (1 / math.sqrt(d), -math.log(m), masks == "causal")
    grad = torch.randn(2, 3, n, e, dtype=dtype)
    with at_most(isa):
        y = OP(q, k, v, mask, slopes, *settings)
        got = (y, *torch.autograd.grad(y, (q, k, v), grad))
    wide = (q.detach().double(), k.detach().double(), v.detach().double())
    for value in wide:
        value.requires_grad_()
    mask = mask.double() if masks == "added" and mask is not None else mask
    exact = sigmoid_attention(*wide, mask, None if slopes is None else slopes.double(), *settings)
    wanted = (exact, *torch.autograd.grad(exact, wide, grad.double()))
    for a, b in zip(got, wanted, strict=True):
        close = 5e-6 if dtype == torch.float32 else 1e-13
        assert (a - b).abs().max() <= close * b.abs().max().clamp_min(1e-6)


def test_gradients_agree_with_finite_differences() -> None:
    q, k, v = (torch.randn(2, n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 5, 5))
    for causal in (False, True):
        assert torch.autograd.gradcheck(lambda *x, c=causal: OP(*x, None, None, 0.6, -1.2, c), (q, k, v))


@every_isa
def test_weights_are_accurate_where_they_are_small_and_saturate_to_0_and_1(isa: int) -> None:
    x = torch.cat([torch.linspace(-85, 40, 1000), torch.tensor([-math.inf, -1e4, 1e4, math.inf])])
    with at_most(isa):
        p = OP(torch.ones(1, 1), torch.ones(x.numel(), 1), torch.eye(x.numel()), x[None], None, 0.0, 0.0, False)[0]
    wanted = torch.sigmoid(x.double())
    assert torch.allclose(p.double(), wanted, rtol=5e-7, atol=0)
    assert p[-4:].tolist() == [0, 0, 1, 1]


@every_isa
def test_hidden_rows_views_and_empty_sizes(isa: int) -> None:
    x = torch.randn(2, 9, 3, 24)
    q, k, v = x.permute(0, 2, 1, 3).chunk(3, -1)
    k = k.contiguous().transpose(-1, -2).contiguous().transpose(-1, -2)  # no dense rows
    hidden = torch.zeros(9, 9, dtype=torch.bool)
    with at_most(isa):
        y = OP(q, k, v, None, None, 0.3, -2.0, False)
        assert torch.equal(OP(q, k, v, hidden, None, 0.3, 0.0, False), torch.zeros(2, 3, 9, 8))
        assert torch.equal(OP(q, k[..., :0, :], v[..., :0, :], None, None, 0.3, 0.0, False), torch.zeros(2, 3, 9, 8))
        assert OP(q[..., :0, :], k, v, None, None, 0.3, 0.0, False).shape == (2, 3, 0, 8)
    assert torch.allclose(y, sigmoid_attention(q, k, v, scale=0.3, bias=-2.0), rtol=2e-6, atol=2e-6)


def test_one_and_two_threads_give_the_same_bits() -> None:
    before, results = torch.get_num_threads(), []
    q, k, v = torch.randn(1, 500, 32), torch.randn(1, 700, 32), torch.randn(1, 700, 32)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(OP(q, k, v, None, None, 0.2, -6.0, True))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_wrong_operands_are_named() -> None:
    q = torch.randn(2, 3, 4)
    with pytest.raises(RuntimeError, match="must share a dtype"):
        OP(q, q.double(), q, None, None, 1.0, 0.0, False)
    with pytest.raises(RuntimeError, match="does not broadcast"):
        OP(q, q, q, torch.zeros(2, 5), None, 1.0, 0.0, False)
    mask = torch.zeros(3, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="has no gradient of its mask"):
        OP(q, q, q, mask, None, 1.0, 0.0, False).sum().backward()


def test_it_is_a_good_citizen() -> None:
    q = torch.randn(2, 4, 8, requires_grad=True)
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration"]
    torch.library.opcheck(OP, (q, q, q, None, None, 0.3, -1.0, True), test_utils=checks)


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.sigmoid(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) - math.log(k.shape[-2])) @ v


def added(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.sigmoid(q @ k.transpose(-2, -1) * 0.2 + mask + -2.5) @ v


def filled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.sigmoid((q @ k.transpose(-2, -1) * 0.2 - 2.5).masked_fill(mask < 0, float("-inf"))) @ v


@torch.no_grad()
@pytest.mark.parametrize("codegen", ["ops", "inductor"])
@pytest.mark.parametrize("function", [plain, added, filled])
def test_the_spellings_run_in_the_operator(function: Callable[..., Tensor], codegen: str) -> None:
    q, k, v, mask = torch.randn(2, 3, 9, 8), torch.randn(2, 3, 11, 8), torch.randn(2, 3, 11, 8), torch.randn(9, 11)
    compiled = torch.compile(function, backend="fxquant", options={"codegen": codegen})
    assert torch.allclose(compiled(q, k, v, mask), function(q, k, v, mask), rtol=2e-5, atol=2e-6)
    (site,) = [site for site in fxquant.report(compiled).sites if site.kind == "sigmoid_attention"]
    assert (site.kernel, site.error_class) == ("sigmoid_attention", "REAL")


def test_with_gradients_the_graph_stays_differentiable() -> None:
    q, k, v, mask = heads(9, 8), heads(11, 8), heads(11, 8), torch.randn(9, 11)
    with pytest.warns(UserWarning, match="gradients are enabled"):
        y = torch.compile(plain, backend="fxquant", options={"codegen": "ops"})(q, k, v, mask)
    wanted = torch.autograd.grad(plain(q, k, v, mask).sum(), (q, k, v))
    for a, b in zip(torch.autograd.grad(y.sum(), (q, k, v)), wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
