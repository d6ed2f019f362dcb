"""FireQ: keys under rotary embeddings, columns of one size, the power of two of FP8 group scales."""

import pytest
import torch
from torch import Tensor

from fxquant.calibration.migration import fireq
from fxquant.calibration.rounding.grid import encode
from fxquant.errors import CalibrationError
from fxquant.reference import dequantize_weight

TOKENS, KV_HEADS, HEADS, SIZE = 40, 2, 6, 16


def rotary(x: Tensor) -> Tensor:
    """Llama's: x cos + cat(-x₂, x₁) sin for x [T, H, d]."""
    angle = torch.arange(len(x), dtype=x.dtype)[:, None] * 10000 ** (-torch.arange(0, SIZE, 2, dtype=x.dtype) / SIZE)
    cos, sin = (f(angle).repeat(1, 2)[:, None] for f in (torch.cos, torch.sin))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def keys_and_queries() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(TOKENS, KV_HEADS, SIZE, generator=generator, dtype=torch.float64)
    keys = keys * torch.logspace(-1, 1.5, SIZE, dtype=torch.float64)
    return keys, torch.randn(TOKENS, HEADS, SIZE, generator=generator, dtype=torch.float64)


def scores(keys: Tensor, queries: Tensor) -> Tensor:
    """Q Kᵀ [H, T, T], query head h reading key head h // 3."""
    return queries.transpose(0, 1) @ keys.repeat_interleave(HEADS // KV_HEADS, 1).permute(1, 2, 0)


@pytest.mark.parametrize("top_k", [0, 1, 3])
def test_scores_stay_and_ranges_fall(top_k: int) -> None:
    keys, queries = keys_and_queries()
    scale = fireq.key_scales(keys, rotary(keys), top_k)
    inverse = scale.queries(HEADS)
    scaled_keys = rotary(keys * scale.before.double()) * scale.after.double()
    scaled_queries = rotary(queries / scale.before.double().repeat_interleave(3, 0)) / scale.after.double().repeat_interleave(
        3, 0
    )
    torch.testing.assert_close(
        scores(scaled_keys, scaled_queries), scores(rotary(keys), rotary(queries)), rtol=1e-12, atol=1e-10
    )
    assert (scaled_keys.abs().amax(0) <= 1 + 1e-6).all()
    torch.testing.assert_close(inverse.before * scale.before.repeat_interleave(3, 0), torch.ones(HEADS, SIZE))
    torch.testing.assert_close(inverse.after * scale.after.repeat_interleave(3, 0), torch.ones(HEADS, SIZE))


def test_partners_share_what_comes_before_the_rotation() -> None:
    keys, _ = keys_and_queries()
    scale = fireq.key_scales(keys, rotary(keys), 3)
    assert torch.equal(scale.before[:, : SIZE // 2], scale.before[:, SIZE // 2 :])
    late = scale.after != 1
    assert torch.equal(late[:, : SIZE // 2], late[:, SIZE // 2 :])
    assert (scale.before[late] == 1).all()
    assert ((late.sum(1) >= 4) & (late.sum(1) <= 6)).all()


def test_the_scale_is_the_greatest_length_of_a_pair() -> None:
    keys = torch.tensor([[[3.0, 0.5, 4.0, 0.0]], [[1.0, 1.2, 1.0, 1.6]]])
    torch.testing.assert_close(fireq.key_scales(keys).before, torch.tensor([[1 / 5, 1 / 2, 1 / 5, 1 / 2]]))
    with pytest.raises(CalibrationError, match="no pairs"):
        fireq.key_scales(keys[..., :3])


def test_columns_weigh_the_same() -> None:
    weight = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 0, 8)
    for of in ("mean", "max"):
        scaled = (weight * fireq.column_factor(weight, 0.0096, of)).abs()
        torch.testing.assert_close(scaled.mean(0) if of == "mean" else scaled.amax(0), torch.full((8,), 0.0096))


def test_the_worked_example_of_one_group() -> None:
    weight = torch.tensor([[0.003, -0.0021, 0.0010, -0.0004]])
    expected = {1: 0.362, 2: 0.113, 4: 0.0489, 8: 0.0489, 16: 0.0489, 32: 0.0400, 64: 0.0400}
    known = {1: [2, -1, 1, 0], 32: [7, -5, 2, -1], 64: [7, -5, 2, -1]}
    for power, error in expected.items():
        scaled = weight * power
        scale = fireq.fp8_scale(scaled.abs().amax(1) / 7)
        codes = encode(scaled, scale, 4, 0)
        if power in known:
            assert codes.tolist() == [known[power]]
        assert float((dequantize_weight(codes, scale, 0) - scaled).norm() / scaled.norm()) == pytest.approx(error, abs=2e-3), (
            power
        )
    assert fireq.tensor_scale(weight, 4) == 8
    assert fireq.tensor_scale(weight, 4, fireq.SMALLEST_NORMAL_E4M3) == 64


def test_no_group_may_exceed_the_greatest_fp8() -> None:
    weight = torch.tensor([[0.003, 0, 100.0, 0]])
    assert fireq.tensor_scale(weight, 2) == 4
    assert fireq.tensor_scale(torch.tensor([[500.0]]), 1) == 1
