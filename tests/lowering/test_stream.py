"""Decode kernels of every instruction set against the reference: exact codes and sums, the same float bits or a bound."""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fxquant.ops
from fxquant import reference
from fxquant.config import ISAS
from fxquant.errors import PackError
from fxquant.lowering.cpu.build import library_path
from fxquant.lowering.pack import pack_linear, round_codes
from fxquant.schemes import GROUPED, GROUPS, WEIGHT_ONLY_SCHEMES, Scheme, parse_integer_scheme
from fxquant.testing.kernels import LEVELS, at_most

NAMES = [
    *WEIGHT_ONLY_SCHEMES,
    "w4a16-g64",
    "w4a16-g128",
    "w4a8-g32",
    "w4a8-g64",
    "w4a8-g128",
    "w2a16-g32",
    "w8a16-g256",
    "w4a8-g16",
]
ALL_SCHEMES = [parse_integer_scheme(name) for name in NAMES]
SHAPES = [
    (1, 1, 1),  # one element
    (1, 17, 3),  # one row, ragged panel, less than one step
    (1, 16, 8),  # one row, one panel, one step
    (1, 50, 100),  # a last group that is shorter, ragged step
    (1, 130, 576),  # one row, many groups
    (2, 3, 5),
    (6, 33, 64),  # a full row block
    (7, 40, 300),  # row remainder, more than one unpacked block
    (13, 16, 1000),  # more than one row block of the widest kernels
    (130, 20, 70),  # more than one block of rows
]


def run(x: Tensor, packed: Tensor, bias: Tensor | None, n: int, scheme: Scheme) -> Tensor:
    y: Tensor = torch.ops.fxquant.linear_stream(x, packed, bias, n, scheme.weight_bits, scheme.act_bits, scheme.group)
    return y


def check(x: Tensor, weight: Tensor, scheme: Scheme, bias: Tensor | None = None) -> None:
    rounded, packed = round_codes(weight, scheme), pack_linear(weight, scheme)
    codes, scale, n = rounded.codes, rounded.scale, weight.shape[0]
    for isa in LEVELS:
        where = f"{ISAS[isa]}, {scheme}, {tuple(x.shape)} x {n}"
        with at_most(isa):
            y = run(x, packed, bias, n, scheme)
            sums = None if scheme.is_weight_only else torch.ops.fxquant.stream_sums(x, packed)
        assert y.shape == (*x.shape[:-1], n)
        flat, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, n)
        if scheme.is_weight_only:
            wanted = reference.linear_weight_only(flat, codes, scale, bias, scheme.group)
            bound = reference.float_tolerance(flat, codes, scale, scheme.weight_bits, scheme.group)
            extra = 0.0 if bias is None else torch.finfo(torch.float32).eps * wanted.abs()
            assert ((y - wanted).abs() <= bound + extra).all(), where
            continue
        q, _, zero = reference.quantize_activation(flat, 8)
        assert sums is not None
        assert torch.equal(sums, reference.group_sums(q, zero, codes, scheme.group)), f"{where}: sums"
        same = reference.linear_groups(flat, codes, scale, bias, scheme.group)
        assert torch.equal(y.isnan(), same.isnan()), f"{where}: NaN"
        assert torch.equal(y.nan_to_num(), same.nan_to_num()), f"{where}: values"


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gaussian(shape: tuple[int, int, int], scheme: Scheme) -> None:
    m, n, k = shape
    check(torch.randn(m, k) * 3, torch.randn(n, k), scheme, torch.randn(n))
    check(torch.randn(m, k) * 3, torch.randn(n, k) ** 3, scheme)


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (17, 5), (48, 300), (33, 64)], ids=str)
def test_packed_codes_and_scales_are_those_of_the_reference(shape: tuple[int, int], scheme: Scheme) -> None:
    weight = torch.randn(shape)
    codes, scale = reference.quantize_weight_groups(weight, scheme.weight_bits, scheme.group)
    packed = pack_linear(weight, scheme)
    assert packed.numel() == fxquant.ops.stream_bytes(*shape, scheme.weight_bits, scheme.act_bits, scheme.group)
    unpacked_codes, unpacked_scale = torch.ops.fxquant.unpack_stream(packed)
    assert torch.equal(unpacked_codes, codes)
    assert torch.equal(unpacked_scale, scale)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 20),
    n=st.integers(1, 50),
    k=st.integers(1, 200),
    seed=st.integers(0, 10**6),
    base=st.sampled_from(GROUPED),
    group=st.sampled_from([0, *GROUPS]),
)
def test_any_shape_and_group(m: int, n: int, k: int, seed: int, base: str, group: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator) * 10 ** float(torch.randint(-6, 7, (1,), generator=generator))
    plain = parse_integer_scheme(base)
    scheme = Scheme(plain.weight_bits, plain.act_bits, group or (0 if plain.is_weight_only else GROUPS[0]))
    check(x, torch.randn(n, k, generator=generator), scheme)


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("weights", ["all largest", "all smallest", "random signs"])
def test_inputs_that_reach_the_extremes_of_every_lane(weights: str, rows: int) -> None:
    k, n = 512, 32
    weight = {"all largest": torch.ones(n, k), "all smallest": -torch.ones(n, k), "random signs": torch.randn(n, k).sign()}[
        weights
    ]
    low, high = torch.ones(rows, k), torch.ones(rows, k)
    low[:, 0], high[:, 0] = -1.0, -1e-4  # zero points of 128 and 0
    for x in (low, high, -low, -high):
        for name in ("w4a8-g16", "w4a8-g64", "w4a8-g256"):
            check(x, weight, parse_integer_scheme(name))


@pytest.mark.parametrize("rows", [1, 5])
def test_integer_rows_that_are_zero_tiny_huge_or_not_finite(rows: int) -> None:
    weight = torch.randn(20, 40)
    values = [
        torch.zeros(40),
        torch.full((40,), 1e-41),
        3e38 * torch.randn(40).sign(),
        torch.randn(40).abs(),
        -torch.randn(40).abs(),
    ]
    for bad in (float("nan"), float("inf"), -float("inf")):
        values.append(torch.randn(40))
        values[-1][7] = bad
    for value in values:
        x = torch.randn(rows, 40)
        x[-1] = value
        check(x, weight, parse_integer_scheme("w4a8-g16"), torch.randn(20))


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_row_that_is_not_finite_spoils_that_row_only(rows: int, scheme: Scheme) -> None:
    x = torch.randn(rows, 48)
    x[0, 4] = float("inf")
    packed = pack_linear(torch.ones(5, 48), scheme)
    for isa in LEVELS:
        with at_most(isa):
            y = run(x, packed, None, 5, scheme)
        assert y.isfinite().any(1).tolist() == [False] + [True] * (rows - 1)


def test_zero_weights_give_zero() -> None:
    for scheme in ALL_SCHEMES:
        for rows in (1, 4):
            # masked codes are 2^(b-1) too large; taking the sum of x out again leaves what float addition lost
            y = run(torch.randn(rows, 80), pack_linear(torch.zeros(20, 80), scheme), None, 20, scheme)
            assert y.abs().max() < 1e-30, str(scheme)


def test_batches_strides_and_empty_batches() -> None:
    weight, scheme = torch.randn(24, 20), parse_integer_scheme("w4a8-g16")
    for x in (torch.randn(2, 3, 4, 20), torch.randn(20, 6).t(), torch.randn(6, 40)[:, ::2], torch.randn(20)):
        check(x, weight, scheme)
        check(x, weight, parse_integer_scheme("w4a16"))
    assert run(torch.empty(0, 20), pack_linear(weight, scheme), None, 24, scheme).shape == (0, 24)


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 40, 300])
def test_one_and_two_threads_give_the_same_bits(rows: int, scheme: Scheme) -> None:
    x, before = torch.randn(rows, 640), torch.get_num_threads()
    packed, results = pack_linear(torch.randn(1000, 640), scheme), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(run(x, packed, None, 1000, scheme))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=str)
@pytest.mark.parametrize("rows", [1, 20])
def test_the_c_entry_point_writes_its_columns_and_nothing_beside_them(rows: int, scheme: Scheme) -> None:
    (n, k), (n0, n1) = (90, 70), (16, 77)
    x, bias, packed = torch.randn(rows, k + 5), torch.randn(n), pack_linear(torch.randn(n, k), scheme)
    out = torch.full((rows, 128), float("nan"))
    wanted = run(x[:, :k], packed, bias, n, scheme)[:, n0:n1]
    library, long, pointer = ctypes.CDLL(str(library_path())), ctypes.c_int64, ctypes.c_void_p
    library.fxquant_stream_linear(
        pointer(x.data_ptr()), long(k + 5), long(rows), pointer(packed.data_ptr()), pointer(bias.data_ptr()),
        long(n0), long(n1), pointer(out[0, n0:].data_ptr()), long(out.stride(0)),
    )  # fmt: skip
    assert torch.equal(out[:, n0:n1], wanted)
    assert int(out.isnan().sum()) == out.numel() - wanted.numel()


def test_one_group_is_the_per_channel_definition() -> None:
    x, weight, bias = torch.randn(6, 100), torch.randn(30, 100), torch.randn(30)
    codes, scale = reference.quantize_weight(weight, 4)
    wanted = reference.linear_dynamic(x, codes, scale, bias, 8)
    assert torch.equal(
        run(x, pack_linear(weight, parse_integer_scheme("w4a8-g128")), bias, 30, parse_integer_scheme("w4a8-g128")), wanted
    )


def test_reference_worked_example() -> None:
    weight = torch.tensor([[7.0, -3.5, 1.0, 0.0, 70.0, 35.0]])
    codes, scale = reference.quantize_weight_groups(weight, 4, 4)  # the second group is shorter
    assert scale.tolist() == [[1.0, 10.0]]
    assert codes.tolist() == [[7, -4, 1, 0, 7, 4]]  # -3.5 and 3.5 round to even
    assert reference.fake_quant_per_group(weight, 4, 4).tolist() == [[7.0, -4.0, 1.0, 0.0, 70.0, 40.0]]
    y = reference.linear_weight_only(torch.ones(1, 6), codes, scale, torch.tensor([1.0]), 4)
    assert y.tolist() == [[7 - 4 + 1 + 110 + 1.0]]


def test_smaller_groups_cost_less_accuracy() -> None:
    weight = torch.randn(64, 512) * torch.logspace(-1, 1, 512)
    errors = [(reference.fake_quant_per_group(weight, 4, group) - weight).square().mean() for group in (16, 64, 256, 0)]
    assert errors == sorted(errors)


@pytest.mark.parametrize("test", ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"])
def test_linear_stream_is_a_good_citizen(test: str) -> None:
    args = (torch.randn(2, 3, 48), pack_linear(torch.randn(8, 48), Scheme(4, 8, 32)), torch.randn(8), 8, 4, 8, 32)
    torch.library.opcheck(torch.ops.fxquant.linear_stream, args, test_utils=test)


def test_the_other_operators_are_good_citizens() -> None:
    rounded = round_codes(torch.randn(9, 100), Scheme(4, 16, 32))
    torch.library.opcheck(
        torch.ops.fxquant.pack_stream, (rounded.codes, rounded.scale, 4, 16, 32), test_utils=["test_schema", "test_faketensor"]
    )
    torch.library.opcheck(
        torch.ops.fxquant.fake_quant_per_group, (torch.randn(4, 60), 4, 16), test_utils=["test_schema", "test_faketensor"]
    )
    weight = torch.randn(5, 70, requires_grad=True)
    torch.ops.fxquant.fake_quant_per_group(weight, 4, 32).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.ones(5, 70))


def test_errors_name_the_problem() -> None:
    packed = pack_linear(torch.randn(8, 32), Scheme(4, 16, 32))
    call = torch.ops.fxquant.linear_stream
    with pytest.raises(RuntimeError, match="packed as w4a16-g32 8 x 32, the call asks for w4a8-g32"):
        call(torch.randn(2, 32), packed, None, 8, 4, 8, 32)
    with pytest.raises(RuntimeError, match="the call asks for w4a16-g32 8 x 16"):
        call(torch.randn(2, 16), packed, None, 8, 4, 16, 32)
    with pytest.raises(RuntimeError, match="no streamed weight"):
        call(torch.randn(2, 32), torch.zeros_like(packed), None, 8, 4, 16, 32)
    with pytest.raises(RuntimeError, match="truncated"):
        call(torch.randn(2, 32), packed[:-64].clone(), None, 8, 4, 16, 32)
    with pytest.raises(RuntimeError, match="must be float32"):
        call(torch.randn(2, 32).double(), packed, None, 8, 4, 16, 32)
    with pytest.raises(RuntimeError, match="bias must be float32 of 8 values"):
        call(torch.randn(2, 32), packed, torch.randn(9), 8, 4, 16, 32)
    codes, scale = torch.zeros((2, 32), dtype=torch.int8), torch.ones(2, 1)
    with pytest.raises(RuntimeError, match="no decode kernel for w3a16"):
        torch.ops.fxquant.pack_stream(codes, scale, 3, 16, 0)
    with pytest.raises(RuntimeError, match="groups of 500 input features; use a multiple of 16"):
        torch.ops.fxquant.pack_stream(codes, scale, 4, 16, 500)
    with pytest.raises(RuntimeError, match=r"scales must be float32 \[2, 2\]"):
        torch.ops.fxquant.pack_stream(codes, scale, 4, 16, 16)
    with pytest.raises(RuntimeError, match="outside the range of 4 bits"):
        torch.ops.fxquant.pack_stream(codes + 8, scale, 4, 16, 0)
    with pytest.raises(PackError, match="holds 1 values that are not finite"):
        pack_linear(torch.tensor([[1.0, float("nan")]]), Scheme(4, 16))
    with pytest.raises(RuntimeError, match="has no gradient: it is an inference kernel"):
        call(torch.randn(2, 32, requires_grad=True), packed, None, 8, 4, 16, 32).sum().backward()
