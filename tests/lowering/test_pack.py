import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.errors import PackError
from fxquant.lowering.pack import pack_linear, round_weight, weight_error
from fxquant.reference import MAX_K, quantize_weight
from fxquant.schemes import PANEL_SCHEMES, Scheme

SCHEDULED = [scheme for scheme in PANEL_SCHEMES.values() if scheme.weight_bits + scheme.act_bits <= 15]


def largest_pair(scheme: Scheme) -> int:
    """The most that two products of one step add to a 16-bit lane."""
    return ((1 << scheme.act_bits) - 1) * 2 * ((1 << (scheme.weight_bits - 1)) - 1)


def align(size: int) -> int:
    return -(-size // 64) * 64


def schedule(packed: torch.Tensor, n: int, k: int, scheme: Scheme) -> list[list[tuple[int, list[int]]]]:
    """Segments (length, 32 centres) of every panel, read back from a packed weight by its documented layout."""
    raw = bytes(packed.tolist())
    panels, steps = -(-n // 16), -(-k // 4)
    capacity = -(-steps // (65535 // largest_pair(scheme)))
    counts_at = 64 + panels * (steps * 64 + 128)
    lengths_at = counts_at + align(panels * 4) + panels * 64
    centres_at = lengths_at + align(panels * capacity * 2)
    counts = struct.unpack_from(f"<{panels}i", raw, counts_at)
    found = []
    for panel, count in enumerate(counts):
        lengths = struct.unpack_from(f"<{count}H", raw, lengths_at + panel * capacity * 2)
        rows = [struct.unpack_from("<32h", raw, centres_at + (panel * capacity + g) * 64) for g in range(count)]
        found.append([(length, list(row)) for length, row in zip(lengths, rows, strict=True)])
    return found


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 200),
    seed=st.integers(0, 10**6),
    kind=st.integers(0, 2),
    scheme=st.sampled_from(SCHEDULED),
)
def test_no_input_can_overflow_a_segment(n: int, k: int, seed: int, kind: int, scheme: Scheme) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    weight = [weight, weight.sign(), weight**5][kind]
    codes, _ = quantize_weight(weight, scheme.weight_bits)
    padded = torch.zeros(-(-n // 16) * 16, -(-k // 4) * 4, dtype=torch.int64)
    padded[:n, :k] = codes
    most = 2**scheme.act_bits - 1
    lanes = padded.view(-1, 16, padded.shape[1] // 4, 2, 2)  # panel, column, step, lane half, pair
    for panel, segments in enumerate(schedule(pack_linear(weight, scheme), n, k, scheme)):
        assert sum(length for length, _ in segments) == padded.shape[1] // 4
        start = 0
        for length, centres in segments:
            part = lanes[panel, :, start : start + length]
            high = most * part.clamp_min(0).sum((1, 3)).flatten() + torch.tensor(centres)
            low = most * part.clamp_max(0).sum((1, 3)).flatten() + torch.tensor(centres)
            assert int(high.max()) <= 32767
            assert int(low.min()) >= -32768
            start += length


def test_one_product_pair_saturates_for_w8a8_only() -> None:
    assert [str(scheme) for scheme in PANEL_SCHEMES.values() if largest_pair(scheme) > 32767] == ["w8a8"]
    assert len(SCHEDULED) == len(PANEL_SCHEMES) - 1


def test_segments_are_as_long_as_the_weights_allow() -> None:
    packed = pack_linear(torch.ones(16, 400), Scheme(8, 7))
    assert {length for length, _ in schedule(packed, 16, 400, Scheme(8, 7))[0]} == {2}  # the worst case
    packed = pack_linear(torch.randn(16, 400), Scheme(4, 4))
    assert [length for length, _ in schedule(packed, 16, 400, Scheme(4, 4))[0]] == [100]  # one for the whole row


@pytest.mark.parametrize("scheme", SCHEDULED, ids=str)
@pytest.mark.parametrize("signs", [(1, 1, 1, 1), (1, -1, 1, -1)])
def test_the_depth_that_is_safe_for_any_weight(scheme: Scheme, signs: tuple[int, ...]) -> None:
    """linear-layers 21.4: D products of these sizes fit an int16 lane from zero on; a centred lane has twice the room."""
    codes, weights = (1 << scheme.act_bits) - 1, (1 << (scheme.weight_bits - 1)) - 1
    depth = 32767 // (codes * weights)
    k = 4 * 700
    packed = pack_linear(torch.tensor(signs).repeat(16, k // 4).to(torch.float32), scheme)
    lengths = [length for length, _ in schedule(packed, 16, k, scheme)[0]]
    assert min(lengths[:-1], default=k // 4) in (depth, depth + 1)


def test_the_size_depends_on_the_shape_and_the_scheme_only() -> None:
    for scheme in PANEL_SCHEMES.values():
        sizes = {
            pack_linear(weight, scheme).numel() for weight in (torch.randn(33, 50), torch.ones(33, 50), torch.zeros(33, 50))
        }
        assert len(sizes) == 1


def test_errors_name_the_problem() -> None:
    with pytest.raises(PackError, match=r"shape \(3,\) cannot be packed; it must be a non-empty matrix"):
        pack_linear(torch.ones(3), Scheme(8, 8))
    with pytest.raises(PackError, match="non-empty"):
        pack_linear(torch.ones(0, 4), Scheme(8, 8))
    with pytest.raises(PackError, match="holds 2 values that are not finite"):
        pack_linear(torch.tensor([[1.0, float("nan"), float("inf")]]), Scheme(8, 8))
    with pytest.raises(PackError, match=f"at most {MAX_K} are exact"):
        pack_linear(torch.ones(1, MAX_K + 1), Scheme(8, 8))


def test_the_operators_check_their_operands() -> None:
    packed = pack_linear(torch.randn(8, 16), Scheme(8, 8))
    call = torch.ops.fxquant.linear_dynamic
    with pytest.raises(RuntimeError, match="packed as w8a8"):
        call(torch.randn(2, 16), packed, None, 8, 8, 7)
    with pytest.raises(RuntimeError, match="packed as w8a8"):
        call(torch.randn(2, 12), packed, None, 8, 8, 8)
    with pytest.raises(RuntimeError, match="no packed weight"):
        call(torch.randn(2, 16), torch.zeros_like(packed), None, 8, 8, 8)
    with pytest.raises(RuntimeError, match="truncated"):
        call(torch.randn(2, 16), packed[:-64].clone(), None, 8, 8, 8)
    with pytest.raises(RuntimeError, match="must be float32"):
        call(torch.randn(2, 16).double(), packed, None, 8, 8, 8)
    with pytest.raises(RuntimeError, match="bias must be float32 of 8 values"):
        call(torch.randn(2, 16), packed, torch.randn(9), 8, 8, 8)
    with pytest.raises(RuntimeError, match="no kernel for w3a4; use 4 to 8 bits each"):
        call(torch.randn(2, 16), packed, None, 8, 3, 4)
    with pytest.raises(RuntimeError, match=f"1 to {MAX_K} columns"):
        torch.ops.fxquant.pack_linear(torch.zeros((2, 0), dtype=torch.int8), torch.ones(2), 8, 8)
    with pytest.raises(RuntimeError, match="outside the range of 7 bits"):
        torch.ops.fxquant.pack_linear(torch.full((2, 4), 100, dtype=torch.int8), torch.ones(2), 7, 7)


def test_weight_error_in_decibel() -> None:
    weight = torch.randn(2, 256)
    weight[1] = 0.4
    weight[1, 0] = 127.0  # scale 1: every 0.4 becomes 0, so the noise is 255 · 0.16
    assert (
        abs(weight_error(weight, round_weight(weight, Scheme(8, 8))).worst_db - 10 * math.log10((127**2 + 40.8) / 40.8)) < 0.01
    )
    exact = torch.zeros(2, 3)
    assert weight_error(exact, round_weight(exact, Scheme(8, 8))).worst_db == float("inf")
