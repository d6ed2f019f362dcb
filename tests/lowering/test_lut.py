"""2-bit weights by table look-up: every instruction set against the reference, the same sums and the same float bits."""

import ctypes
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxquant
import fxquant.ops
from fxquant import reference
from fxquant.config import ISAS
from fxquant.linear_formats import LUT, format_of
from fxquant.lowering.pack import pack_linear
from fxquant.schemes import SCHEMES, Scheme
from fxquant.testing.kernels import LEVELS, at_most

assert fxquant.ops.LIBRARY is not None
ACT_BITS = (2, 3, 4, 5, 6)
SHAPES = [
    (1, 1, 1),  # one element
    (1, 17, 3),  # one row, ragged panel, ragged index
    (2, 3, 5),
    (3, 16, 16),  # one panel, one step
    (4, 32, 17),  # a pair of panels, ragged step
    (5, 48, 8),  # a pair and a last panel alone
    (7, 40, 31),
    (8, 33, 64),  # a full block of rows
    (9, 50, 511),  # a second block, nearly a chunk of k
    (2, 18, 513),  # a second chunk of one value
    (17, 300, 1100),  # more panels than are kept, three chunks
    (100, 130, 64),
]


def ternary(n: int, k: int) -> Tensor:
    return torch.randint(-1, 2, (n, k)).float()


def assert_same(x: Tensor, weight: Tensor, act_bits: int, bias: Tensor | None = None) -> None:
    codes, scale = reference.quantize_weight(weight, 2)
    q, _, zero = reference.quantize_activation(x, act_bits)
    sums = reference.linear_sums(q, zero, codes)
    wanted = reference.linear_dynamic(x, codes, scale, bias, act_bits)
    packed, n = pack_linear(weight, Scheme(2, act_bits)), weight.shape[0]
    for isa in LEVELS:
        where = f"{ISAS[isa]}, a{act_bits}, {tuple(x.shape)} x {n}"
        with at_most(isa):
            assert torch.equal(torch.ops.fxquant.linear_lut_int32(x, packed, n, act_bits), sums), f"{where}: sums"
            y = torch.ops.fxquant.linear_lut(x, packed, bias, n, act_bits)
        assert torch.equal(y.isnan(), wanted.isnan()), f"{where}: NaN"
        assert torch.equal(y.nan_to_num(), wanted.nan_to_num()), f"{where}: values"


@pytest.mark.parametrize("act_bits", ACT_BITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gaussian(shape: tuple[int, int, int], act_bits: int) -> None:
    m, n, k = shape
    assert_same(torch.randn(m, k) * 3, torch.randn(n, k), act_bits, torch.randn(n))


@pytest.mark.parametrize("act_bits", ACT_BITS)
@pytest.mark.parametrize("weights", ["all plus", "all minus", "random", "sparse"])
def test_inputs_that_reach_the_largest_byte_and_word(weights: str, act_bits: int) -> None:
    n, k = 33, 2048
    weight = {
        "all plus": torch.ones(n, k),
        "all minus": -torch.ones(n, k),
        "random": ternary(n, k),
        "sparse": torch.randn(n, k) ** 5,
    }[weights]
    largest = (weight[:1] > 0).float()  # the largest code where a weight is plus, 0 elsewhere
    negative = torch.cat([torch.full((1, k - 1), -1.0), torch.zeros(1, 1)], 1)  # zero point at the top
    assert_same(torch.cat([largest, 1 - largest, torch.ones(1, k), negative]), weight, act_bits)


@pytest.mark.parametrize("act_bits", ACT_BITS)
def test_rows_that_are_zero_tiny_huge_or_not_finite(act_bits: int) -> None:
    x = torch.randn(10, 40)
    x[0] = 0
    x[1] = 1e-41
    x[2] = 3e38 * x[2].sign()
    x[3, 7] = float("nan")
    x[4, 0] = float("inf")
    x[5, 39] = -float("inf")
    x[6] = -x[6].abs()
    x[7] = x[7].abs()
    x[8] = -0.0
    assert_same(x, torch.randn(20, 40), act_bits, torch.randn(20))


def test_batches_strides_and_empty_batches() -> None:
    weight = torch.randn(24, 20)
    assert_same(torch.randn(2, 3, 4, 20), weight, 4)
    assert_same(torch.randn(20, 6).t(), weight, 4)
    assert_same(torch.randn(6, 40)[:, ::2], weight, 6)
    assert_same(torch.randn(20), weight, 6)
    empty = torch.ops.fxquant.linear_lut(torch.empty(0, 20), pack_linear(weight, Scheme(2, 4)), None, 24, 4)
    assert empty.shape == (0, 24)


@settings(max_examples=60, deadline=None)
@given(m=st.integers(1, 40), n=st.integers(1, 140), k=st.integers(1, 90), seed=st.integers(0, 10**6), bits=st.integers(2, 6))
def test_any_shape(m: int, n: int, k: int, seed: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator) * 10 ** float(torch.randint(-6, 7, (1,), generator=generator))
    assert_same(x, torch.randn(n, k, generator=generator), bits)


@pytest.mark.parametrize("isa", LEVELS, ids=lambda isa: str(ISAS[isa]))
@pytest.mark.parametrize(("n0", "n1"), [(0, 90), (32, 77), (64, 65)])
def test_a_tile_is_written_whole_and_nothing_beside_it(isa: int, n0: int, n1: int) -> None:
    (m, n, k), (m0, m1), act_bits = (40, 90, 70), (3, 30), 4
    x, weight = torch.randn(m, k), torch.randn(n, k)
    packed, out = pack_linear(weight, Scheme(2, act_bits)), torch.full((m, 128), float("nan"))
    codes, scale = reference.quantize_weight(weight, 2)
    wanted = reference.linear_dynamic(x, codes, scale, None, act_bits)[m0:m1, n0:n1]
    long, pointer = ctypes.c_int64, ctypes.c_void_p
    with at_most(isa) as library:
        library.fxquant_linear_scratch_bytes.restype = library.fxquant_lut_table_bytes.restype = ctypes.c_int64
        size = library.fxquant_linear_scratch_bytes(long(m), long(k), 2, act_bits)
        room = library.fxquant_lut_table_bytes(long(k))
        scratch, tables = (torch.full((count,), 255, dtype=torch.uint8) for count in (size, room + 64))
        rows = pointer(scratch.data_ptr())
        library.fxquant_quantize_rows(pointer(x.data_ptr()), long(k), long(0), long(m), long(k), 2, act_bits, rows, long(m))
        library.fxquant_lut_tile(
            rows, long(m), pointer(packed.data_ptr()), long(m0), long(m1), long(n0), long(n1),
            pointer(tables.data_ptr()), pointer(out[m0, n0:].data_ptr()), long(out.stride(0)),
        )  # fmt: skip
    assert torch.equal(out[m0:m1, n0:n1], wanted)
    assert int(out.isnan().sum()) == out.numel() - wanted.numel()
    assert (tables[room:] == 255).all()


@pytest.mark.parametrize("rows", [1, 3, 16, 101])
def test_one_and_two_threads_give_the_same_bits(rows: int) -> None:
    x, packed, before = torch.randn(rows, 96), pack_linear(torch.randn(270, 96), Scheme(2, 4)), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(torch.ops.fxquant.linear_lut(x, packed, None, 270, 4))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_a_packed_weight_takes_two_bits_a_value() -> None:
    n, k = 256, 1024
    packed = pack_linear(torch.randn(n, k), Scheme(2, 4))
    assert packed.numel() == n * k // 4 + 64 + n * 8  # a header, and scale and sum of each column
    assert LUT.packed_bytes(n, k, Scheme(2, 4)) == packed.numel()
    assert format_of(Scheme(2, 4)) is LUT


@pytest.mark.parametrize("shape", [(1, 1), (17, 5), (64, 384), (200, 130)])
def test_the_operators_are_good_citizens(shape: tuple[int, int]) -> None:
    codes, scale = reference.quantize_weight(torch.randn(shape), 2)
    packed = torch.ops.fxquant.pack_lut(codes, scale, 4)
    assert packed.numel() == fxquant.ops.packed_lut_bytes(*shape)
    tests = ["test_schema", "test_faketensor"]
    torch.library.opcheck(torch.ops.fxquant.pack_lut, (codes, scale, 4), test_utils=tests)
    args = (torch.randn(2, 3, shape[1]), packed, torch.randn(shape[0]), shape[0], 4)
    torch.library.opcheck(torch.ops.fxquant.linear_lut, args, test_utils=[*tests, "test_aot_dispatch_dynamic"])
    torch.library.opcheck(torch.ops.fxquant.linear_lut_int32, (*args[:2], *args[3:]), test_utils=tests)


def test_the_operators_check_their_operands() -> None:
    packed, call = pack_linear(torch.randn(8, 16), Scheme(2, 4)), torch.ops.fxquant.linear_lut
    with pytest.raises(RuntimeError, match="packed as w2a4"):
        call(torch.randn(2, 16), packed, None, 8, 6)
    with pytest.raises(RuntimeError, match="packed as w2a4 8 x 16, the call asks for w2a4 8 x 12"):
        call(torch.randn(2, 12), packed, None, 8, 4)
    with pytest.raises(RuntimeError, match="no packed weight"):
        call(torch.randn(2, 16), pack_linear(torch.randn(8, 16), Scheme(8, 8)), None, 8, 4)
    with pytest.raises(RuntimeError, match="truncated"):
        call(torch.randn(2, 16), packed[:-64].clone(), None, 8, 4)
    with pytest.raises(RuntimeError, match="must be float32"):
        call(torch.randn(2, 16).double(), packed, None, 8, 4)
    with pytest.raises(RuntimeError, match="bias must be float32 of 8 values"):
        call(torch.randn(2, 16), packed, torch.randn(9), 8, 4)
    with pytest.raises(RuntimeError, match="2 to 6 bits, not 7"):
        call(torch.randn(2, 16), packed, None, 8, 7)
    with pytest.raises(RuntimeError, match="none of -1, 0 and 1"):
        torch.ops.fxquant.pack_lut(torch.full((2, 4), 2, dtype=torch.int8), torch.ones(2), 4)


def test_every_scheme_has_a_format() -> None:
    assert {name for name, scheme in SCHEMES.items() if format_of(scheme) is LUT} == {"w2a4", "w2a6"}


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["w2a4", "w2a6"])
@pytest.mark.parametrize("codegen", ["ops", "inductor"])
def test_a_compiled_linear_equals_the_reference(scheme: str, codegen: str) -> None:
    linear, x = nn.Linear(100, 70), torch.randn(3, 11, 100)
    options: Any = {"scheme": scheme, "codegen": codegen}
    compiled = torch.compile(linear, backend="fxquant", options=options)
    for _ in range(2):
        codes, scale = reference.quantize_weight(linear.weight, 2)
        wanted = reference.linear_dynamic(x, codes, scale, linear.bias, SCHEMES[scheme].act_bits)
        assert torch.equal(compiled(x), wanted)
        linear.weight.mul_(-1.5)  # the packed weight follows its Parameter
    (site,) = fxquant.report(compiled).sites
    assert (site.scheme, site.kernel, site.error_class) == (scheme, "linear_lut", "QUANTIZED")


@torch.no_grad()
def test_a_compiled_model_through_inductor_equals_its_operators() -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 40))
    x, results = torch.randn(2, 9, 64), []
    for codegen in ("ops", "inductor"):
        torch._dynamo.reset()
        options: Any = {"scheme": "w2a4", "codegen": codegen}
        results.append(torch.compile(model, backend="fxquant", options=options)(x))
    assert torch.equal(*results)
