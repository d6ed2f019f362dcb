"""Rotated residual streams: of decoders, tied or not, of vision transformers; what is turned at run time, what is refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.functional import gelu
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from fxquant.calibration.migration.hadamard import hadamard
from fxquant.passes.reparam.legality import UNTIED
from fxquant.passes.reparam.rotation import ORTHOGONAL, SQUARE
from fxquant.passes.reparam.stream import COSTLY, FLOAT32, IN_PLACE, MATRIX, MEANS, NO_STREAM, READER, WRITER
from fxquant.testing.graphs import Captured, capture_call

TOLERANCE = 1e-4
WIDTH = 16


def llama(tied: bool, layers: int) -> Captured:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        tie_word_embeddings=tied,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            nn.init.uniform_(p, 0.5, 1.5)
    return capture_call(lambda ids: model(input_ids=ids, use_cache=False).logits, torch.arange(7)[None] * 3)


def rotate(made: Captured, end: str, matrix: Tensor | None = None) -> dict[str, list[str | None]]:
    site = next(name for name in made.sites if name.endswith(end))
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0] if matrix is None else matrix
    return made.change({"rotation": {site: {"rotation": turn}}}, names=["norm_affine"])


def turns(made: Captured) -> list[fx.Node]:
    """What is multiplied at run time by a rotation."""
    nodes = [node for node in made.gm.graph.nodes if node.meta.get("fxquant") == {"rule": "rotation"}]
    return [node for node in nodes if not node.meta.get("fxquant_frozen")]


@pytest.mark.parametrize("matrix", [None, hadamard(WIDTH).to(torch.float32)])
def test_a_decoder_is_rotated_in_its_weights_alone(matrix: Tensor | None) -> None:
    made = llama(tied=False, layers=2)
    assert rotate(made, "layers.0.mlp.down_proj:linear", matrix)["rotation"] == [None]
    assert turns(made) == []
    assert made.error() < TOLERANCE


def test_a_tied_decoder_is_turned_twice_at_run_time() -> None:
    made = llama(tied=True, layers=5)
    found = rotate(made, "layers.0.mlp.down_proj:linear")
    assert found["rotation"] == [None]
    assert UNTIED in found["norm_affine"], "the head shares its weight with the embedding"
    embedding, last, head = made.node("embedding"), made.node("rms_norm", 10), made.node("linear", 35)
    behind, before = turns(made)
    assert behind.args[0] is embedding
    assert last.args[0] is before
    assert last.args[2] is not None, "γ stays in the last norm"
    assert head.args[1] is embedding.args[0]
    assert embedding.args[0].op == "placeholder", "the shared weight stays"  # type: ignore[union-attr]
    assert made.error() < TOLERANCE


def test_a_tied_decoder_is_left_where_turning_costs_too_much() -> None:
    made = llama(tied=True, layers=2)
    assert rotate(made, "layers.0.mlp.down_proj:linear")["rotation"] == [UNTIED + COSTLY]
    assert turns(made) == []
    assert made.error() < TOLERANCE


def test_a_post_norm_encoder_is_left() -> None:
    config = BertConfig(vocab_size=32, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model = BertModel(config, add_pooling_layer=False).eval()
    made = capture_call(lambda ids: model(input_ids=ids).last_hidden_state, torch.arange(7)[None])
    assert rotate(made, "layer.0.output.dense:linear")["rotation"] == [READER.format("add") + COSTLY]
    assert made.error() < TOLERANCE


class Branch(nn.Module):
    """x + fc2(gelu(fc1(norm(x)))) with a norm of a kind."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = norm(WIDTH), nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(gelu(self.fc1(self.norm(x))))  # type: ignore[no-any-return]


class Vision(nn.Module):
    """Patches by a convolution, a class token, positions, pre-norm branches; the last norm is returned."""

    def __init__(
        self, norm: Callable[[int], nn.Module] = nn.LayerNorm, last: Callable[[int], nn.Module] = nn.LayerNorm
    ) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, WIDTH, 4, 4), nn.Parameter(torch.randn(1, 1, WIDTH))
        self.position = nn.Parameter(torch.randn(1, 5, WIDTH))
        self.blocks = nn.Sequential(*(Branch(norm) for _ in range(6)))
        self.norm = last(WIDTH)

    def embed(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.patch(x).flatten(2).transpose(1, 2)], 1)
        return x + self.position

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(self.embed(x)))  # type: ignore[no-any-return]


IMAGES = torch.linspace(-1, 1, 2 * 3 * 64).sin().reshape(2, 3, 8, 8)


def test_patches_are_turned_behind_the_convolution_and_the_last_norm_sees_them_turned_back() -> None:
    made = capture_call(Vision(), IMAGES)
    assert rotate(made, "blocks.0.fc1:linear")["rotation"] == [None]
    assert len(turns(made)) == 2
    assert (made.count("layer_norm"), made.count("rms_norm")) == (1, 6)
    assert made.error() < TOLERANCE


def test_a_norm_that_needs_the_means_is_not_rotated_with_layer_norms() -> None:
    made = capture_call(Vision(last=nn.RMSNorm), IMAGES)
    assert rotate(made, "blocks.0.fc1:linear")["rotation"] == [MEANS.format("rms_norm")]
    mixed = Vision()
    mixed.blocks[3].norm = nn.RMSNorm(WIDTH)
    made = capture_call(mixed, IMAGES)
    assert rotate(made, "blocks.0.fc1:linear")["rotation"] == [MEANS.format("rms_norm")]
    assert made.error() < TOLERANCE


def test_a_norm_over_more_than_the_channels_reads_the_stream_turned_back() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.blocks = nn.Linear(WIDTH, WIDTH), nn.Sequential(*(Branch(nn.RMSNorm) for _ in range(6)))
            self.head = nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks(self.first(x))
            return self.head(nn.functional.rms_norm(x, (5, WIDTH)))  # type: ignore[no-any-return]

    made = capture_call(Model(), torch.randn(2, 5, WIDTH))
    assert rotate(made, "blocks.0.fc1:linear")["rotation"] == [None]
    assert len(turns(made)) == 1, MATRIX
    assert made.error() < TOLERANCE


def test_a_linear_between_two_places_of_the_stream_is_rotated_on_both_sides() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.mix = nn.Linear(WIDTH, WIDTH), nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
            self.last, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.head(self.last(x + self.mix(self.norm(x))))  # type: ignore[no-any-return]

    made = capture_call(Model(), torch.randn(2, WIDTH))
    assert rotate(made, "mix:linear")["rotation"] == [None]
    assert made.error() < TOLERANCE


@pytest.mark.parametrize("kind", ["in place", "half", "autocast", "square", "orthogonal", "no stream", "input"])
def test_refusals(kind: str) -> None:
    model = Vision()
    matrix = torch.eye(WIDTH)

    def forward(x: Tensor) -> Tensor:
        x = model.embed(x)
        if kind == "in place":
            x.mul_(2)
        if kind == "no stream":
            return model.blocks[0].fc2(model.blocks[0].fc1(x))  # type: ignore[no-any-return, operator]
        if kind == "input":
            return model.blocks[0].fc1(model.norm(x + 1))  # type: ignore[no-any-return, operator]
        with torch.autocast("cpu", torch.bfloat16, kind == "autocast"):
            return model.norm(model.blocks(x))  # type: ignore[no-any-return]

    images = IMAGES
    if kind == "half":
        model, images = model.to(torch.bfloat16), images.to(torch.bfloat16)
        matrix = matrix.to(torch.bfloat16)
    matrix = {"square": torch.eye(WIDTH - 1), "orthogonal": torch.ones(WIDTH, WIDTH)}.get(kind, matrix)
    wanted = {
        "in place": IN_PLACE,
        "half": FLOAT32,
        "autocast": FLOAT32,
        "square": SQUARE,
        "orthogonal": ORTHOGONAL,
        "no stream": NO_STREAM,
        "input": WRITER.format("add") + COSTLY,
    }[kind]
    made = capture_call(forward, images)
    assert rotate(made, "fc1:linear", matrix)["rotation"] == [wanted]
    assert made.error() < 0.02
