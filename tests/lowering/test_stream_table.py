"""Decode kernels of weights whose 4-bit codes stand for a table's values, on every instruction set."""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant import reference
from fxquant.coding import Coding
from fxquant.config import ISAS
from fxquant.errors import PackError
from fxquant.format_schemes import FORMAT_SCHEMES
from fxquant.formats import E2M1, NF4, Minifloat
from fxquant.formats.llm_fp4 import split
from fxquant.granularity import PerChannel, PerGroup, PerToken
from fxquant.lowering.pack_table import TableCodes, round_to_table
from fxquant.ops.stream import TABLE_BYTES, stream_bytes
from fxquant.testing.kernels import LEVELS, at_most

CODINGS = {name: FORMAT_SCHEMES[name].weight for name in ("fp4", "fp4-bnb", "nf4", "mxfp4", "nvfp4")} | {
    "llmfp4 e3m0": Coding(split(3, 0), PerChannel(0)),
    "nf4 of a channel": Coding(NF4, PerChannel(0)),
}
SHAPES = [(1, 1, 1), (1, 17, 3), (1, 16, 8), (1, 50, 100), (2, 3, 5), (6, 33, 64), (7, 40, 300), (13, 16, 1000), (130, 20, 70)]
EACH = pytest.mark.parametrize("name", CODINGS)


def run(x: Tensor, rounded: TableCodes, bias: Tensor | None = None) -> Tensor:
    y: Tensor = torch.ops.fxquant.linear_stream(x, rounded.pack(), bias, rounded.codes.shape[0], 4, 16, rounded.group)
    return y


def check(x: Tensor, rounded: TableCodes, bias: Tensor | None = None) -> None:
    codes, values, scale, group = rounded.codes, rounded.values, rounded.scale, rounded.group
    wanted = reference.linear_table(x, codes, values, scale, bias, group)
    bound = reference.table_tolerance(x, codes, values, scale, group)
    extra = 0.0 if bias is None else torch.finfo(torch.float32).eps * wanted.abs()
    for isa in LEVELS:
        with at_most(isa):
            assert ((run(x, rounded, bias) - wanted).abs() <= bound + extra).all(), f"{ISAS[isa]} {tuple(x.shape)}"


@EACH
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gaussian(shape: tuple[int, int, int], name: str) -> None:
    m, n, k = shape
    rounded = round_to_table(torch.randn(n, k), CODINGS[name])
    check(torch.randn(m, k) * 3, rounded, torch.randn(n))
    check(torch.randn(m, k) * 3, rounded)


@EACH
@pytest.mark.parametrize("rows", [1, 3, 4, 9])
def test_rows_of_the_identity_give_the_dequantized_weight_bit_for_bit(name: str, rows: int) -> None:
    coding, weight = CODINGS[name], torch.randn(33, 136)
    rounded, dequantized = round_to_table(weight, coding), coding.fake_quant(weight)
    for isa in LEVELS:
        with at_most(isa):
            parts = [run(part, rounded) for part in torch.eye(136).split(rows)]
        assert torch.equal(torch.cat(parts).T, dequantized), ISAS[isa]


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7])
def test_sums_that_float32_holds_are_exact(rows: int) -> None:
    rounded = round_to_table(torch.randn(48, 512), CODINGS["mxfp4"])
    x = torch.randint(-15, 16, (rows, 512)).to(torch.float32)
    wanted = reference.linear_table(x, rounded.codes, rounded.values, rounded.scale, None, rounded.group)
    for isa in LEVELS:
        with at_most(isa):
            assert torch.equal(run(x, rounded).to(torch.float64), wanted), ISAS[isa]


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 20),
    n=st.integers(1, 50),
    k=st.integers(1, 200),
    seed=st.integers(0, 10**6),
    group=st.sampled_from([0, 16, 32, 64, 128, 256]),
)
def test_any_shape_group_and_table(m: int, n: int, k: int, seed: int, group: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-k // group) if group else 1
    codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.int8)
    rounded = TableCodes(codes, torch.randn(16, generator=generator), torch.rand(n, groups, generator=generator), group)
    check(torch.randn(m, k, generator=generator), rounded)


@pytest.mark.parametrize("shape", [(1, 1), (17, 5), (48, 300)], ids=str)
def test_the_packed_form_holds_codes_values_and_scales(shape: tuple[int, int]) -> None:
    rounded = round_to_table(torch.randn(shape), CODINGS["nf4"])
    packed = rounded.pack()
    assert packed.numel() == stream_bytes(*shape, 4, 16, 64) + TABLE_BYTES
    codes, scale = torch.ops.fxquant.unpack_stream(packed)
    assert torch.equal(codes, rounded.codes)
    assert torch.equal(scale, rounded.scale)
    assert torch.equal(packed[64:128].view(torch.float32), rounded.values)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_gives_outputs_that_are_not(bad: float) -> None:
    rounded, x = round_to_table(torch.randn(20, 40), CODINGS["nf4"]), torch.randn(5, 40)
    x[2, 7] = bad
    for isa in LEVELS:
        with at_most(isa):
            finite = torch.isfinite(run(x, rounded)).all(1)
        assert finite.tolist() == [True, True, False, True, True], ISAS[isa]


def test_rows_whose_sum_overflows_stay_right() -> None:
    rounded = TableCodes(torch.tensor([[1, 2] * 8], dtype=torch.int8), E2M1.decode(torch.arange(16)), torch.ones(1, 1), 0)
    x = torch.full((1, 16), 3e38)
    x[0, 1:] = 0.0
    check(x, rounded)
    check(torch.tensor([[3e38, -1.5e38] * 8]), TableCodes(rounded.codes, torch.zeros(16), rounded.scale, 0))


def test_codes_outside_of_the_table_are_refused() -> None:
    rounded = round_to_table(torch.randn(4, 8), CODINGS["nf4"])
    for code in (16, -1):
        codes = torch.full_like(rounded.codes, code)
        with pytest.raises(RuntimeError, match=r"outside of 0 \.\. 15"):
            TableCodes(codes, rounded.values, rounded.scale, rounded.group).pack()


def test_codings_without_a_kernel_are_refused() -> None:
    weight = torch.randn(4, 8)
    with pytest.raises(PackError, match="fp8-e4m3 has no kernel"):
        round_to_table(weight, FORMAT_SCHEMES["fp8"].weight)
    with pytest.raises(PackError, match="a group of input features or a channel"):
        round_to_table(weight, Coding(Minifloat(E2M1), PerToken()))
    with pytest.raises(PackError, match="not finite"):
        round_to_table(weight / 0, Coding(Minifloat(E2M1), PerGroup(16)))


def test_the_c_interface_gives_the_bits_of_the_operator() -> None:
    rounded, x, bias = round_to_table(torch.randn(40, 70), CODINGS["mxfp4"]), torch.randn(5, 70), torch.randn(40)
    packed, out = rounded.pack(), torch.full((5, 40), float("nan"))
    wanted = run(x, rounded, bias)
    with at_most(LEVELS[-1]) as library:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        library.fxquant_stream_linear.argtypes = [pointer, number, number, pointer, pointer, number, number, pointer, number]
        library.fxquant_stream_linear(x.data_ptr(), 70, 5, packed.data_ptr(), bias.data_ptr(), 0, 40, out.data_ptr(), 40)
    assert torch.equal(out, wanted)


def test_the_packing_operator_is_a_good_citizen() -> None:
    rounded = round_to_table(torch.randn(20, 100), CODINGS["nf4"])
    args = (rounded.codes, rounded.values, rounded.scale, rounded.group)
    torch.library.opcheck(torch.ops.fxquant.pack_stream_table, args, test_utils=["test_schema", "test_faketensor"])
