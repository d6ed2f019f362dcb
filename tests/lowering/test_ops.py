import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fxquant.ops
from fxquant import reference
from fxquant.lowering.pack import pack_linear
from fxquant.schemes import PANEL_SCHEMES, SCHEMES, Scheme

assert fxquant.ops.LIBRARY is not None


@pytest.mark.parametrize("test", ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"])
def test_linear_dynamic_is_a_good_citizen(test: str) -> None:
    args = (torch.randn(2, 3, 16), pack_linear(torch.randn(8, 16), Scheme(8, 8)), torch.randn(8), 8, 8, 8)
    torch.library.opcheck(torch.ops.fxquant.linear_dynamic, args, test_utils=test)


@pytest.mark.parametrize("test", ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"])
def test_linear_static_is_a_good_citizen(test: str) -> None:
    qparams = (torch.rand(16) / 50 + 0.01, torch.tensor([30], dtype=torch.int32))
    args = (torch.randn(2, 3, 16), pack_linear(torch.randn(8, 16), Scheme(6, 6)), torch.randn(8), *qparams, 8, 6, 6)
    torch.library.opcheck(torch.ops.fxquant.linear_static, args, test_utils=test)


@pytest.mark.parametrize("scheme", [SCHEMES[name] for name in ("w8a8", "w7a8", "w6a6", "w4a4")], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (17, 5), (64, 384), (200, 130)])
def test_packing_is_a_good_citizen_and_its_size_is_known(shape: tuple[int, int], scheme: Scheme) -> None:
    bits = (scheme.weight_bits, scheme.act_bits)
    args = (*reference.quantize_weight(torch.randn(shape), scheme.weight_bits), *bits)
    assert torch.ops.fxquant.pack_linear(*args).numel() == fxquant.ops.packed_bytes(*shape, *bits)
    torch.library.opcheck(torch.ops.fxquant.pack_linear, args, test_utils=["test_schema", "test_faketensor"])


def test_the_packed_size_of_every_scheme_is_known() -> None:
    for scheme in PANEL_SCHEMES.values():
        assert pack_linear(torch.randn(33, 70), scheme).numel() == fxquant.ops.packed_bytes(
            33, 70, scheme.weight_bits, scheme.act_bits
        )


def test_the_int32_form_is_a_good_citizen() -> None:
    args = (torch.randn(2, 3, 16), pack_linear(torch.randn(8, 16), Scheme(8, 8)), 8, 8, 8, -1)
    torch.library.opcheck(torch.ops.fxquant.linear_dynamic_int32, args, test_utils=["test_schema", "test_faketensor"])


def test_batches_of_any_size_share_one_compiled_graph() -> None:
    packed, graphs = pack_linear(torch.randn(8, 16), Scheme(8, 7)), CompileCounterWithBackend("aot_eager")
    op = torch.ops.fxquant.linear_dynamic
    compiled = torch.compile(lambda x: op(x * 2, packed, None, 8, 8, 7) + 1, backend=graphs, dynamic=True)
    for rows in (2, 3, 50):
        x = torch.randn(rows, 16)
        assert torch.equal(compiled(x), op(x * 2, packed, None, 8, 8, 7) + 1)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("op", [torch.ops.fxquant.fake_quant_per_token, torch.ops.fxquant.fake_quant_per_channel])
def test_fake_quant_is_a_good_citizen(op: torch._ops.OpOverloadPacket) -> None:
    torch.library.opcheck(op, (torch.randn(4, 6), 8), test_utils=["test_schema", "test_faketensor"])


def test_the_kernel_refuses_gradients() -> None:
    x = torch.randn(2, 16, requires_grad=True)
    y = torch.ops.fxquant.linear_dynamic(x, pack_linear(torch.randn(8, 16), Scheme(8, 8)), None, 8, 8, 8)
    with pytest.raises(RuntimeError, match="has no gradient: it is an inference kernel"):
        y.sum().backward()


def test_fake_quant_is_straight_through_and_idempotent() -> None:
    x = torch.randn(5, 7, requires_grad=True)
    y = torch.ops.fxquant.fake_quant_per_token(x, 7)
    y.backward(torch.full_like(y, 3.0))
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full_like(x, 3.0))
    weight = torch.randn(5, 7)
    once = reference.fake_quant_per_channel(weight, 8)
    assert torch.allclose(reference.fake_quant_per_channel(once, 8), once, rtol=1e-6)


@pytest.mark.parametrize("test", ["test_schema", "test_faketensor", "test_autograd_registration"])
def test_static_fake_quant_is_a_good_citizen(test: str) -> None:
    args = (torch.randn(4, 6, requires_grad=True), torch.rand(6) + 0.1, torch.tensor([8], dtype=torch.int32), 4)
    torch.library.opcheck(torch.ops.fxquant.fake_quant_static, args, test_utils=test)


def test_static_fake_quant_is_straight_through_clips_and_keeps_what_lies_on_its_grid() -> None:
    steps, zero = torch.tensor([0.5, 0.25]), torch.tensor([3], dtype=torch.int32)
    x = torch.tensor([[-1.5, 3.0], [99.0, -99.0], [0.6, 0.1]], requires_grad=True)
    y = torch.ops.fxquant.fake_quant_static(x, steps, zero, 4)
    assert y.tolist() == [[-1.5, 3.0], [6.0, -0.75], [0.5, 0.0]]
    y.backward(torch.full_like(y, 3.0))
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full_like(x, 3.0))
    half = torch.ops.fxquant.fake_quant_static(x.detach().bfloat16(), steps, zero, 4)
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [4, 6, 7, 8])
def test_the_error_of_an_activation_is_at_most_half_a_step(bits: int) -> None:
    x = torch.randn(100, 33) * torch.logspace(-5, 5, 100)[:, None]
    _, scale, _ = reference.quantize_activation(x, bits)
    error = (reference.fake_quant_per_token(x, bits) - x).abs()
    # half a step for the code and half a step for the rounded zero point, at the ends of the range
    assert (error <= scale[:, None] * 1.0001).all()
    assert error.mean() <= scale.mean() / 3


def test_reference_worked_example() -> None:
    x = torch.tensor([[-1.0, 0.0, 1.55]])
    codes, scale, zero = reference.quantize_activation(x, 8)
    assert torch.allclose(scale, torch.tensor([0.01]))
    assert (zero.tolist(), codes.tolist()) == ([100], [[0, 100, 255]])
    weight_codes, weight_scale = reference.quantize_weight(torch.tensor([[127.0, -63.5, 1.0]]), 8)
    static = reference.quantize_static(x, scale, zero.to(torch.int32), 8)
    assert torch.equal(static, codes)
    assert (weight_codes.tolist(), weight_scale.tolist()) == ([[127, -64, 1]], [1.0])  # -63.5 rounds to even
