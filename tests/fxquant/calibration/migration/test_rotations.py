"""Hadamard matrices of every order wanted, their transform, and rotated decoders that compute the same function."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, rms_norm

from fxquant.calibration.migration import hadamard, quarot
from fxquant.calibration.migration.quarot import Block, Decoder
from fxquant.errors import CalibrationError

# order: (base, power of two). Paley I, Paley II and fields of p² and p³, Sylvester.
ORDERS = {
    1: (1, 1),
    2: (1, 2),
    64: (1, 64),
    12: (12, 1),
    20: (20, 1),
    24: (12, 2),
    28: (28, 1),
    36: (36, 1),
    44: (44, 1),
    52: (52, 1),
    60: (60, 1),
    76: (76, 1),
    100: (100, 1),
    108: (108, 1),
    140: (140, 1),
    148: (148, 1),
    312: (312, 1),
    344: (344, 1),
    924: (924, 1),
    576: (36, 16),
    768: (12, 64),
    896: (28, 32),
    1536: (12, 128),
}
LARGE = {
    3072: (12, 256),
    5120: (20, 256),
    6144: (12, 512),
    4864: (76, 64),
    8960: (140, 64),
    9728: (76, 128),
    11008: (344, 32),
    13824: (108, 128),
    14336: (28, 512),
    18944: (148, 128),
    19968: (312, 64),
    25600: (100, 256),
    27648: (108, 256),
    29568: (924, 32),
}


@pytest.mark.parametrize("order", ORDERS)
def test_rows_are_orthogonal_and_entries_are_signs(order: int) -> None:
    assert hadamard.split_order(order) == ORDERS[order]
    matrix = hadamard.hadamard(order)
    assert (matrix.abs() == 1).all()
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", LARGE)
def test_large_orders_split(order: int) -> None:
    base, power = hadamard.split_order(order)
    assert (base, power) == LARGE[order]
    assert base * power == order


@pytest.mark.parametrize("order", [1, 16, 12, 28, 576, 768])
def test_the_transform_is_the_product(order: int) -> None:
    x = torch.randn(3, 2, order, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(hadamard.transform(x), x @ hadamard.hadamard(order) / order**0.5, rtol=1e-12, atol=1e-12)
    y = hadamard.transform(x.to(torch.float32))
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.to(torch.float64), hadamard.transform(x), rtol=1e-4, atol=1e-5)


def test_the_worked_example_of_a_spread_peak() -> None:
    x = torch.tensor([8, 0.1, -0.2, 0.1], dtype=torch.float64)
    torch.testing.assert_close(hadamard.transform(x), torch.tensor([4.0, 3.8, 4.1, 4.1], dtype=torch.float64))


def test_a_random_rotation_is_orthogonal_and_its_seeds() -> None:
    one, again, other = hadamard.randomized(48, 1), hadamard.randomized(48, 1), hadamard.randomized(48, 2)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    torch.testing.assert_close(one @ one.T, torch.eye(48, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_an_order_without_a_matrix_is_refused_with_the_blocks_that_there_are() -> None:
    with pytest.raises(CalibrationError, match=r"no Hadamard matrix of order 1888 .* blocks of 32 on the diagonal"):
        hadamard.split_order(1888)
    with pytest.raises(CalibrationError, match="no power of two of at least 32"):
        hadamard.split_order(100 - 8)


HEADS, KV_HEADS, SIZE, WIDTH, HIDDEN, VOCABULARY = 6, 2, 8, 48, 96, 31


def decoder(seed: int = 0) -> Decoder:
    """Two layers, grouped queries, biases of the writers and of v, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        drawn: Tensor = torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5
        return drawn

    def block() -> Block:
        return Block(
            attention_norm=1 + draw(WIDTH),
            q=draw(HEADS * SIZE, WIDTH),
            k=draw(KV_HEADS * SIZE, WIDTH),
            v=draw(KV_HEADS * SIZE, WIDTH),
            o=draw(WIDTH, HEADS * SIZE),
            mlp_norm=1 + draw(WIDTH),
            gate=draw(HIDDEN, WIDTH),
            up=draw(HIDDEN, WIDTH),
            down=draw(WIDTH, HIDDEN),
            v_bias=draw(KV_HEADS * SIZE),
            o_bias=draw(WIDTH),
            down_bias=draw(WIDTH),
        )

    return Decoder(draw(VOCABULARY, WIDTH), (block(), block()), 1 + draw(WIDTH), draw(VOCABULARY, WIDTH))


def run(model: Decoder, online: bool = False) -> Tensor:
    """Logits of ten tokens; the position is left out of q and k, which no rotation here touches."""
    x = model.embedding[torch.arange(10) * 3]
    mask = torch.ones(10, 10, dtype=torch.bool).tril()
    for block in model.blocks:
        assert block.v_bias is not None
        assert block.o_bias is not None
        assert block.down_bias is not None
        h = rms_norm(x, (WIDTH,), block.attention_norm, 1e-6)
        q, k = (h @ weight.T for weight in (block.q, block.k))
        v = h @ block.v.T + block.v_bias
        q, k, v = (each.unflatten(1, (-1, SIZE)).transpose(0, 1) for each in (q, k, v))
        k, v = (each.repeat_interleave(HEADS // KV_HEADS, 0) for each in (k, v))
        scores = (q @ k.transpose(1, 2) / SIZE**0.5).masked_fill(~mask, -torch.inf)
        x = x + (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ block.o.T + block.o_bias
        h = rms_norm(x, (WIDTH,), block.mlp_norm, 1e-6)
        hidden = nn.functional.silu(h @ block.gate.T) * (h @ block.up.T)
        x = x + (hadamard.transform(hidden) if online else hidden) @ block.down.T + block.down_bias
    return rms_norm(x, (WIDTH,), model.norm, 1e-6) @ model.head.T


def test_every_rotation_keeps_the_function() -> None:
    model = decoder()
    exact = run(model)
    folded = quarot.fold_norms(model)
    torch.testing.assert_close(run(folded), exact, rtol=1e-12, atol=1e-12)
    rotated = quarot.rotate_stream(folded, hadamard.randomized(WIDTH, 0))
    torch.testing.assert_close(run(rotated), exact, rtol=1e-12, atol=1e-12)
    assert (rotated.embedding - folded.embedding).abs().amax() > 0.1
    heads = hadamard.randomized(SIZE, 1)
    blocks = tuple(quarot.rotate_heads(block, heads, HEADS, KV_HEADS) for block in rotated.blocks)
    by_heads = Decoder(rotated.embedding, blocks, rotated.norm, rotated.head)
    torch.testing.assert_close(run(by_heads), exact, rtol=1e-12, atol=1e-12)
    online = Decoder(by_heads.embedding, tuple(map(quarot.rotate_down, blocks)), by_heads.norm, by_heads.head)
    torch.testing.assert_close(run(online, online=True), exact, rtol=1e-12, atol=1e-12)
    assert (run(online) - exact).abs().amax() > 0.01


def test_a_rotation_before_the_norms_are_folded_is_refused() -> None:
    with pytest.raises(CalibrationError, match="call fold_norms first"):
        quarot.rotate_stream(decoder(), hadamard.randomized(WIDTH, 0))


def test_what_is_no_rotation_is_refused() -> None:
    folded = quarot.fold_norms(decoder())
    with pytest.raises(CalibrationError, match="not orthogonal"):
        quarot.rotate_stream(folded, hadamard.hadamard(WIDTH))
    with pytest.raises(CalibrationError, match=r"is \[48, 48\], not \(12, 12\)"):
        quarot.rotate_stream(folded, hadamard.randomized(12, 0))
    with pytest.raises(CalibrationError, match="are not of 2 and 6 heads of 12"):
        quarot.rotate_heads(folded.blocks[0], hadamard.randomized(12, 0), HEADS, KV_HEADS)


def test_a_centred_writer_makes_layer_norm_an_rms_norm() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((5, 16), (48, 16), (48,)))
    centred, shifted = quarot.center_writer(weight, bias)
    assert shifted is not None
    before = layer_norm(x @ weight.T + bias, (48,), eps=1e-5)
    torch.testing.assert_close(rms_norm(x @ centred.T + shifted, (48,), eps=1e-5), before, rtol=1e-12, atol=1e-12)


def test_a_rotation_spreads_an_outlier_channel() -> None:
    x = torch.randn(64, 768, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 100] *= 100
    spread = x @ hadamard.randomized(768, 0)
    assert spread.abs().amax() < 0.1 * x.abs().amax()
