"""Reparameterizations on the graphs of real models: grouped heads, RoPE, RMSNorm, tied embeddings."""

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

from fxquant.passes.reparam.rotary_scale import _PAIRS as PAIRS
from fxquant.testing.graphs import Captured, capture_call

TOLERANCE = 1e-4
HIDDEN, HEADS, KEY_HEADS, DEPTH, LAYERS = 16, 4, 2, 4, 2


def llama() -> nn.Module:
    """A Llama with two query heads a key head; norms and biases are not at their first values."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        attention_bias=True,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            nn.init.uniform_(p, 0.5, 1.5)
    return model  # type: ignore[no-any-return]


def captured(model: nn.Module) -> Captured:
    tokens = torch.arange(7)[None] * 3

    def call(tokens: Tensor) -> Tensor:
        return model(input_ids=tokens, use_cache=False).logits  # type: ignore[no-any-return]

    return capture_call(call, tokens)


def site(made: Captured, end: str) -> str:
    return next(name for name in made.sites if name.endswith(end))


def test_norms_of_llama_give_their_gain_to_all_readers() -> None:
    made = captured(llama())
    assert made.change(names=["norm_affine"])["norm_affine"] == [None] * (5 * LAYERS + 1)
    assert made.error() < TOLERANCE
    assert all(made.node("rms_norm", i).args[2] is None for i in range(2 * LAYERS + 1))


def test_values_of_grouped_heads_take_a_factor() -> None:
    made = captured(llama())
    factor = torch.rand(KEY_HEADS * DEPTH) + 0.5
    found = made.change({"value_scale": {site(made, "layers.0.self_attn.o_proj:linear"): {"factor": factor}}})
    assert found == {"value_scale": [None]}
    assert made.error() < TOLERANCE


@pytest.mark.parametrize("are_pairs", [True, False])
def test_keys_before_rope_take_a_factor_of_pairs(are_pairs: bool) -> None:
    made = captured(llama())
    half = torch.rand(KEY_HEADS, 1, DEPTH // 2) + 0.5
    factor = half.expand(-1, 2, -1).flatten().clone()
    if not are_pairs:
        factor[0] += 1
    found = made.change({"rotary_scale": {site(made, "layers.1.self_attn.k_proj:linear"): {"factor": factor}}})
    assert found == {"rotary_scale": [None if are_pairs else PAIRS]}
    assert made.error() < TOLERANCE


def test_a_vision_transformer_of_transformers() -> None:
    config = ViTConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        attn_implementation="sdpa",
    )
    model = ViTModel(config, add_pooling_layer=True).eval()
    made = capture_call(lambda x: model(pixel_values=x).pooler_output, torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8))
    found = made.change(names=["norm_affine", "attention_scale"])
    assert found["norm_affine"] == [None] * (4 * LAYERS + 1), "the pooler reads one token of the last norm"
    assert found["attention_scale"] == [None] * LAYERS
    assert made.error() < TOLERANCE
