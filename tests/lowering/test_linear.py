"""Every instruction set's kernels against the reference: the same codes, the same sums, the same float bits."""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fxquant.ops
from fxquant import reference
from fxquant.config import ISAS
from fxquant.lowering.cpu.build import library_path
from fxquant.lowering.pack import pack_linear
from fxquant.schemes import PANEL_SCHEMES, SCHEMES, Scheme
from fxquant.testing.kernels import LEVELS, at_most

assert fxquant.ops.LIBRARY is not None
ALL_SCHEMES = list(PANEL_SCHEMES.values())
# One a class: 16 bits, 15 bits with the wider operand on either side, and fewer bits with ever longer segments.
CLASSES = [SCHEMES[name] for name in ("w8a8", "w8a7", "w7a8", "w7a7", "w6a8", "w8a5", "w6a6", "w4a8", "w4a4")]
SHAPES = [
    (1, 1, 1),  # one element
    (1, 17, 3),  # one row, ragged panel, ragged step
    (2, 3, 5),
    (5, 16, 4),  # one panel, one step
    (6, 33, 4),  # a full row block, ragged panels
    (7, 40, 31),  # row remainder
    (13, 64, 100),
    (15, 31, 384),  # more than one 14-row block
    (29, 16, 4096),  # many segments
    (100, 130, 64),  # more than one tile of rows and columns
]


def assert_same(x: Tensor, weight: Tensor, scheme: Scheme, bias: Tensor | None = None) -> None:
    codes, scale = reference.quantize_weight(weight, scheme.weight_bits)
    q, scale_x, zero = reference.quantize_activation(x.reshape(-1, x.shape[-1]), scheme.act_bits)
    sums = reference.linear_sums(q, zero, codes)
    packed, n = pack_linear(weight, scheme), weight.shape[0]
    bits = (scheme.weight_bits, scheme.act_bits)
    for isa in LEVELS:
        got = torch.ops.fxquant.linear_dynamic_int32(x, packed, n, *bits, isa)
        for name, a, b in zip(("codes", "scale", "zero point", "sums"), got, (q, scale_x, zero, sums), strict=True):
            same = torch.equal(a, b) if name != "scale" else torch.equal(a.view(torch.int32), b.view(torch.int32)) or (
                torch.equal(a.isnan(), b.isnan()) and torch.equal(a[~a.isnan()], b[~b.isnan()])
            )  # fmt: skip
            assert same, f"{ISAS[isa]}, {scheme}, {tuple(x.shape)} x {n}: {name}"
    wanted = reference.linear_dynamic(x, codes, scale, bias, scheme.act_bits)
    for isa in LEVELS:
        with at_most(isa):
            y = torch.ops.fxquant.linear_dynamic(x, packed, bias, n, *bits)
        assert torch.equal(y.isnan(), wanted.isnan()), f"{ISAS[isa]}, {scheme}, {tuple(x.shape)} x {n}: NaN"
        assert torch.equal(y.nan_to_num(), wanted.nan_to_num()), f"{ISAS[isa]}, {scheme}, {tuple(x.shape)} x {n}: values"


# Every shape with w8a8 and with three other schemes, so that every scheme comes by.
SAMPLED = [
    (shape, scheme)
    for i, shape in enumerate(SHAPES)
    for scheme in (ALL_SCHEMES[0], *(ALL_SCHEMES[1 + (3 * i + j) % 24] for j in range(3)))
]


def test_the_sample_holds_every_scheme() -> None:
    assert {scheme for _, scheme in SAMPLED} == set(ALL_SCHEMES)


@pytest.mark.parametrize(("shape", "scheme"), SAMPLED, ids=str)
def test_gaussian(shape: tuple[int, int, int], scheme: Scheme) -> None:
    m, n, k = shape
    assert_same(torch.randn(m, k) * 3, torch.randn(n, k), scheme, torch.randn(n))


@pytest.mark.parametrize("scheme", CLASSES, ids=str)
def test_heavy_tails(scheme: Scheme) -> None:
    assert_same(torch.randn(9, 200) ** 3, torch.randn(50, 200) ** 5, scheme)


@pytest.mark.parametrize("scheme", CLASSES, ids=str)
@pytest.mark.parametrize("weights", ["all largest", "random signs", "gaussian"])
def test_inputs_that_reach_the_extremes_of_every_lane(weights: str, scheme: Scheme) -> None:
    k, n = 512, 32
    weight = {"all largest": torch.ones(n, k), "random signs": torch.randn(n, k).sign(), "gaussian": torch.randn(n, k)}[weights]
    largest = torch.where(weight > 0, 1.0, 0.0)  # the largest code where a weight is positive, 0 elsewhere
    assert_same(torch.cat([largest, 1 - largest, torch.ones(1, k)]), weight, scheme)


@pytest.mark.parametrize("scheme", CLASSES, ids=str)
def test_rows_that_are_zero_tiny_huge_or_not_finite(scheme: Scheme) -> None:
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
    assert_same(x, torch.randn(20, 40), scheme, torch.randn(20))


def test_a_row_that_is_not_finite_gives_nan_in_that_row_only() -> None:
    x = torch.randn(3, 16)
    x[1, 4] = float("inf")
    y = torch.ops.fxquant.linear_dynamic(x, pack_linear(torch.randn(5, 16), Scheme(8, 8)), None, 5, 8, 8)
    assert y.isnan().all(1).tolist() == [False, True, False]


def test_batches_strides_and_empty_batches() -> None:
    weight = torch.randn(24, 20)
    assert_same(torch.randn(2, 3, 4, 20), weight, Scheme(8, 7))
    assert_same(torch.randn(20, 6).t(), weight, Scheme(8, 7))
    assert_same(torch.randn(6, 40)[:, ::2], weight, Scheme(8, 7))
    assert_same(torch.randn(20), weight, Scheme(8, 7))
    empty = torch.ops.fxquant.linear_dynamic(torch.empty(0, 20), pack_linear(weight, Scheme(8, 7)), None, 24, 8, 7)
    assert empty.shape == (0, 24)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 70),
    k=st.integers(1, 90),
    seed=st.integers(0, 10**6),
    scheme=st.sampled_from(ALL_SCHEMES),
)
def test_any_shape(m: int, n: int, k: int, seed: int, scheme: Scheme) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator) * 10 ** float(torch.randint(-6, 7, (1,), generator=generator))
    assert_same(x, torch.randn(n, k, generator=generator), scheme)


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.floats(width=32), min_size=1, max_size=70), scheme=st.sampled_from(ALL_SCHEMES))
def test_any_row_of_floats(values: list[float], scheme: Scheme) -> None:
    assert_same(torch.tensor([values]), torch.eye(len(values)), scheme)


@pytest.mark.parametrize("scheme", CLASSES, ids=str)
@pytest.mark.parametrize("isa", LEVELS, ids=lambda isa: str(ISAS[isa]))
def test_a_tile_is_written_whole_and_nothing_beside_it(isa: int, scheme: Scheme) -> None:
    (m, n, k), (m0, m1, n0, n1) = (40, 90, 70), (3, 37, 16, 77)
    x, weight, bits = torch.randn(m, k), torch.randn(n, k), (scheme.weight_bits, scheme.act_bits)
    packed, out = pack_linear(weight, scheme), torch.full((m, 128), float("nan"))
    wanted = torch.ops.fxquant.linear_dynamic(x, packed, None, n, *bits)[m0:m1, n0:n1]
    with at_most(isa):
        library = ctypes.CDLL(str(library_path()))
        library.fxquant_linear_scratch_bytes.restype = ctypes.c_int64
        long, pointer = ctypes.c_int64, ctypes.c_void_p
        size = library.fxquant_linear_scratch_bytes(long(m), long(k), *bits)
        scratch = torch.full((size,), 255, dtype=torch.uint8)
        place = pointer(scratch.data_ptr())
        library.fxquant_quantize_rows(pointer(x.data_ptr()), long(k), long(0), long(m), long(k), *bits, place, long(m))
        library.fxquant_linear_tile(
            place, long(m), pointer(packed.data_ptr()), long(m0), long(m1), long(n0), long(n1),
            pointer(out[m0, n0:].data_ptr()), long(out.stride(0)),
        )  # fmt: skip
    assert torch.equal(out[m0:m1, n0:n1], wanted)
    assert int(out.isnan().sum()) == out.numel() - wanted.numel()


@pytest.mark.parametrize("scheme", CLASSES, ids=str)
def test_static_activations(scheme: Scheme) -> None:
    x = torch.randn(17, 130) * torch.logspace(-3, 3, 17)[:, None]
    x[3] = -0.0
    x[4] = 3e38 * x[4].sign()
    x[5, 129] = float("nan")
    x[6, 1] = -float("inf")
    weight, bias, bits = torch.randn(40, 130), torch.randn(40), (scheme.weight_bits, scheme.act_bits)
    codes, scale_w = reference.quantize_weight(weight, scheme.weight_bits)
    packed, top = pack_linear(weight, scheme), 2**scheme.act_bits - 1
    channels = torch.logspace(-4, 2, 130)
    for scale, zero in ((0.03, top // 2), (6 / top, 0), (1.2e-38, top), (2e38, 1), (channels, top // 3), (channels[:1], 7)):
        qparams = (torch.as_tensor(scale), torch.tensor([zero], dtype=torch.int32))
        for added in (bias, None):
            wanted = reference.linear_static(x, codes, scale_w, added, *qparams, scheme.act_bits)
            for isa in LEVELS:
                with at_most(isa):
                    y = torch.ops.fxquant.linear_static(x, packed, added, *qparams, 40, *bits)
                assert y.isnan().all(1).nonzero().flatten().tolist() == [5, 6]
                assert torch.equal(y.nan_to_num(), wanted.nan_to_num()), f"{ISAS[isa]}, {scheme}, scale {scale}"


@pytest.mark.parametrize("isa", LEVELS, ids=lambda isa: str(ISAS[isa]))
@pytest.mark.parametrize("bits", [4, 7, 8])
def test_codes_at_and_beside_every_tie(bits: int, isa: int) -> None:
    """Where x / scale is next to n + 1/2 a rounding by the reciprocal would differ from the division's."""
    top = (1 << bits) - 1
    for scale in (0.1, 1.0, 1 / 3, 0.7e-6, 1.1754944e-38, 1.3e36):
        tie = (torch.arange(-top, top + 1) + 0.5) * scale
        near = [tie]
        for direction in (float("inf"), -float("inf")):
            beside = tie
            for _ in range(3):
                beside = torch.nextafter(beside, torch.tensor(direction))
                near.append(beside)
        values = torch.cat(near)
        x = torch.nn.functional.pad(values, (0, -len(values) % 64)).view(-1, 64)
        qparams = (torch.tensor(scale), torch.tensor(top // 2, dtype=torch.int32))
        identity = torch.eye(x.shape[1])  # an output is a code, less the zero point, times 127
        packed = pack_linear(identity, Scheme(8, bits))
        wanted = reference.linear_static(x, *reference.quantize_weight(identity, 8), None, *qparams, bits)
        with at_most(isa):
            y = torch.ops.fxquant.linear_static(x, packed, None, *qparams, x.shape[1], 8, bits)
        assert torch.equal(y, wanted), scale


@pytest.mark.parametrize("bits", [4, 6, 7, 8])
def test_codes_at_and_beside_every_tie_of_a_row_with_its_own_scale(bits: int) -> None:
    """The kernels may multiply by the inverse of the scale: the codes must be those of a division."""
    top = (1 << bits) - 1
    for scale in (0.1, 1.0, 1 / 3, 1 + 2.0**-23, 2 - 2.0**-23, 0.7e-6, 1e-30, 1.1754944e-38, 1e17, 1e20, 1.3e36):
        low, high = torch.tensor(-(top // 3) * scale), torch.tensor((top - top // 3) * scale)
        exact = high / top - low / top
        tie = (torch.arange(-(top // 3), top - top // 3) + 0.5) * exact
        near = [tie]
        for direction in (float("inf"), -float("inf")):
            beside = tie
            for _ in range(3):
                beside = torch.nextafter(beside, torch.tensor(direction))
                near.append(beside)
        values = torch.cat(near).clamp(low, high)
        x = torch.nn.functional.pad(values, (0, -len(values) % 62)).view(-1, 62)
        x = torch.cat([x, low.expand(len(x), 1), high.expand(len(x), 1)], 1)  # the ends decide on the scale
        wanted, scales, zeros = reference.quantize_activation(x, bits)
        assert torch.equal(scales, exact.clamp_min(reference.linear.SMALLEST).expand(len(x)))
        packed = pack_linear(torch.eye(64), Scheme(8, bits))
        for isa in LEVELS:
            codes, _, zero, _ = torch.ops.fxquant.linear_dynamic_int32(x, packed, 64, 8, bits, isa)
            assert torch.equal(codes, wanted), (ISAS[isa], scale)
            assert torch.equal(zero, zeros), (ISAS[isa], scale)


@pytest.mark.parametrize("k", [1, 7, 8, 15, 16, 31, 33, 64, 130])
def test_every_channel_has_its_own_step(k: int) -> None:
    """The codes themselves: the weight is the identity, and steps differ from one channel to the next."""
    x = torch.randn(9, k) * 4
    steps, zero = torch.rand(k) / 10 + 0.01, torch.tensor([90], dtype=torch.int32)
    packed = pack_linear(torch.eye(k), Scheme(8, 8))
    wanted = reference.quantize_static(x, steps, zero, 8)
    for isa in LEVELS:
        with at_most(isa):
            y = torch.ops.fxquant.linear_static(x, packed, None, steps, zero, k, 8, 8)
        assert torch.equal((y + 90).round().to(torch.uint8), wanted), ISAS[isa]


def test_one_and_two_threads_code_alike_with_given_steps() -> None:
    x, before = torch.randn(101, 96), torch.get_num_threads()
    qparams = (torch.rand(96) / 20 + 0.01, torch.tensor([60], dtype=torch.int32))
    packed, results = pack_linear(torch.randn(70, 96) * qparams[0], Scheme(8, 7)), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(torch.ops.fxquant.linear_static(x, packed, None, *qparams, 70, 8, 7))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_static_qparams_are_checked() -> None:
    packed, one = pack_linear(torch.randn(8, 16), Scheme(8, 8)), torch.ones(1)
    call, zero = torch.ops.fxquant.linear_static, torch.zeros(1, dtype=torch.int32)
    for scale, zero_point, message in (
        (0 * one, zero, "scale 0 is no positive normal number"),
        (one / 0, zero, "scale inf is no positive normal number"),
        (one, zero + 256, r"zero point 256 lies outside 0 \.\. 255"),
        (one, zero - 1, "zero point -1 lies outside"),
        (torch.cat([torch.ones(15), 0 * one]), zero, "scale 0 is no positive normal number"),
        (torch.ones(2), zero, "scale must be float32 of 1 or 16 values"),
        (torch.ones(16, dtype=torch.float64), zero, "scale must be float32 of 1 or 16 values"),
        (one, torch.zeros(1), "zero point must be one int32 value"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(torch.randn(2, 16), packed, None, scale, zero_point, 8, 8, 8)


def test_a_refused_call_leaves_the_instruction_set_alone() -> None:
    before = ctypes.CDLL(str(library_path())).fxquant_isa()
    with pytest.raises(RuntimeError, match="no packed weight"):
        torch.ops.fxquant.linear_dynamic_int32(torch.randn(1, 4), torch.zeros(64, dtype=torch.uint8), 4, 8, 8, 0)
    with pytest.raises(RuntimeError, match="does not run instruction set 9"):
        torch.ops.fxquant.linear_dynamic_int32(torch.randn(1, 4), torch.zeros(64, dtype=torch.uint8), 4, 8, 8, 9)
    assert ctypes.CDLL(str(library_path())).fxquant_isa() == before


@pytest.mark.parametrize(("m", "n", "k"), [(101, 70, 96), (16, 200, 256), (1, 640, 900), (257, 48, 64)])
def test_any_number_of_threads_gives_the_same_bits(m: int, n: int, k: int) -> None:
    x, weight, before = torch.randn(m, k), torch.randn(n, k), torch.get_num_threads()
    for scheme in (Scheme(8, 8), Scheme(6, 6)):
        packed, results = pack_linear(weight, scheme), []
        try:
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                results += [
                    torch.ops.fxquant.linear_dynamic(x, packed, None, n, scheme.weight_bits, scheme.act_bits) for _ in range(20)
                ]
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(result, results[0]) for result in results)


def test_w8a7_is_close_to_float() -> None:
    x, weight = torch.randn(64, 384), torch.randn(128, 384)
    y = torch.ops.fxquant.linear_dynamic(x, pack_linear(weight, Scheme(8, 7)), None, 128, 8, 7)
    noise = (y - x @ weight.T).square().mean() / (x @ weight.T).square().mean()
    assert noise < 1e-3
