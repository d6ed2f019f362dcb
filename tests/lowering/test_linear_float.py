"""The float linear on every instruction set: as close to float64 as F.linear is, and nothing but its tile is written."""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear

import fxquant.ops
from fxquant.config import ISAS
from fxquant.testing.kernels import LEVELS, at_most

assert fxquant.ops.LIBRARY is not None
SHAPES = [
    (1, 1, 1),  # one element
    (1, 17, 3),  # one row, ragged panel
    (2, 8, 5),  # half a panel
    (5, 16, 4),
    (6, 33, 4),  # a full row block on AVX2
    (7, 40, 31),
    (12, 64, 100),  # a full row block on AVX-512
    (13, 31, 384),  # one whole chunk of k
    (29, 16, 385),  # a second chunk of one value
    (140, 300, 800),  # more than one tile of rows and columns, three chunks
]
EPS = torch.finfo(torch.float32).eps


def assert_close(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """k + 1 rounded additions, each off by at most half an ulp of what they add up to: the stated tolerance."""
    packed, n, k = torch.ops.fxquant.pack_float(weight), weight.shape[0], weight.shape[1]
    wide = None if bias is None else bias.double()
    exact = linear(x.double(), weight.double(), wide)
    bound = linear(x.double().abs(), weight.double().abs(), None if wide is None else wide.abs()) * (k + 2) * EPS / 2
    for isa in LEVELS:
        with at_most(isa):
            y = torch.ops.fxquant.linear_float(x, packed, bias, n)
        assert y.shape == exact.shape
        assert ((y - exact).abs() <= bound + 1e-45).all(), f"{ISAS[isa]}, {tuple(x.shape)} x {n}"


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_the_bound_of_a_float_sum(shape: tuple[int, int, int], biased: bool) -> None:
    m, n, k = shape
    assert_close(torch.randn(m, k) * 3, torch.randn(n, k), torch.randn(n) if biased else None)


@settings(max_examples=60, deadline=None)
@given(m=st.integers(1, 40), n=st.integers(1, 70), k=st.integers(1, 90), seed=st.integers(0, 10**6))
def test_any_shape(m: int, n: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    assert_close(torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator), None)


@pytest.mark.parametrize("isa", LEVELS, ids=lambda isa: str(ISAS[isa]))
def test_as_accurate_as_the_library_that_it_replaces(isa: int) -> None:
    x, weight = torch.randn(64, 1536), torch.randn(96, 1536)
    exact = linear(x.double(), weight.double())
    with at_most(isa):
        ours = torch.ops.fxquant.linear_float(x, torch.ops.fxquant.pack_float(weight), None, 96)
    error, theirs = ((y - exact).square().mean().sqrt() for y in (ours, linear(x, weight)))
    factor = 8 if ISAS[isa] == "scalar" else 3  # the scalar kernel rounds every product too
    assert error <= factor * theirs


@pytest.mark.parametrize("isa", LEVELS, ids=lambda isa: str(ISAS[isa]))
def test_a_row_that_is_not_finite_spoils_no_other(isa: int) -> None:
    x, weight = torch.randn(9, 40), torch.randn(20, 40)
    x[3, 7], x[5, 39] = float("nan"), float("inf")
    with at_most(isa):
        y = torch.ops.fxquant.linear_float(x, torch.ops.fxquant.pack_float(weight), None, 20)
    assert (~y.isfinite()).all(1).nonzero().flatten().tolist() == [3, 5]
    assert y.isfinite().all(1).sum() == 7


@pytest.mark.parametrize("isa", LEVELS, ids=lambda isa: str(ISAS[isa]))
@pytest.mark.parametrize(("n0", "n1"), [(0, 90), (16, 77), (80, 81)])
@pytest.mark.parametrize("k", [70, 400])
def test_a_tile_is_written_whole_and_nothing_beside_it(isa: int, n0: int, n1: int, k: int) -> None:
    (m, n), (m0, m1) = (40, 90), (3, 30)
    x, weight, bias = torch.randn(m, k), torch.randn(n, k), torch.randn(n)
    packed, out = torch.ops.fxquant.pack_float(weight), torch.full((m, 128), float("nan"))
    long, pointer = ctypes.c_int64, ctypes.c_void_p
    with at_most(isa) as library:
        wanted = torch.ops.fxquant.linear_float(x, packed, bias, n)[m0:m1, n0:n1]
        library.fxquant_float_tile(
            pointer(x.data_ptr()), long(k), pointer(packed.data_ptr()), pointer(bias.data_ptr()),
            long(m0), long(m1), long(n0), long(n1), pointer(out[m0, n0:].data_ptr()), long(out.stride(0)),
        )  # fmt: skip
    assert torch.equal(out[m0:m1, n0:n1], wanted)
    assert int(out.isnan().sum()) == out.numel() - wanted.numel()


@pytest.mark.parametrize("rows", [1, 16, 150])
def test_one_and_two_threads_give_the_same_bits(rows: int) -> None:
    x, packed, before = torch.randn(rows, 500), torch.ops.fxquant.pack_float(torch.randn(270, 500)), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(torch.ops.fxquant.linear_float(x, packed, None, 270))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_batches_strides_and_empty_batches() -> None:
    weight, bias = torch.randn(24, 20), torch.randn(24)
    for x in (torch.randn(2, 3, 4, 20), torch.randn(20, 6).t(), torch.randn(6, 40)[:, ::2], torch.randn(20)):
        assert_close(x, weight, bias)
    assert torch.ops.fxquant.linear_float(torch.empty(0, 20), torch.ops.fxquant.pack_float(weight), None, 24).shape == (0, 24)


@pytest.mark.parametrize("shape", [(1, 1), (17, 5), (64, 384)])
def test_the_operators_are_good_citizens(shape: tuple[int, int]) -> None:
    weight, tests = torch.randn(shape), ["test_schema", "test_faketensor"]
    packed = torch.ops.fxquant.pack_float(weight)
    assert packed.numel() == fxquant.ops.packed_float_bytes(*shape)
    torch.library.opcheck(torch.ops.fxquant.pack_float, (weight,), test_utils=tests)
    args = (torch.randn(2, 3, shape[1]), packed, torch.randn(shape[0]), shape[0])
    torch.library.opcheck(torch.ops.fxquant.linear_float, args, test_utils=[*tests, "test_aot_dispatch_dynamic"])


def test_backward_is_told_that_there_is_no_gradient() -> None:
    x = torch.randn(3, 16, requires_grad=True)
    y = torch.ops.fxquant.linear_float(x, torch.ops.fxquant.pack_float(torch.randn(8, 16)), None, 8)
    with pytest.warns(UserWarning, match="fxquant::linear_float: an autograd kernel was not registered"):
        y.sum().backward()
    assert x.grad is None


def test_the_operators_check_their_operands() -> None:
    packed, call = torch.ops.fxquant.pack_float(torch.randn(8, 16)), torch.ops.fxquant.linear_float
    with pytest.raises(RuntimeError, match="packed as 8 x 16, the call asks for 8 x 12"):
        call(torch.randn(2, 12), packed, None, 8)
    with pytest.raises(RuntimeError, match="no packed weight"):
        call(torch.randn(2, 16), torch.zeros_like(packed), None, 8)
    with pytest.raises(RuntimeError, match="truncated"):
        call(torch.randn(2, 16), packed[:-64].clone(), None, 8)
    with pytest.raises(RuntimeError, match="must be float32"):
        call(torch.randn(2, 16).double(), packed, None, 8)
    with pytest.raises(RuntimeError, match="bias must be float32 of 8 values"):
        call(torch.randn(2, 16), packed, torch.randn(9), 8)
    with pytest.raises(RuntimeError, match="must not be empty"):
        torch.ops.fxquant.pack_float(torch.randn(0, 4))
