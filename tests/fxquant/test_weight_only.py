"""Streamed schemes end to end: a small random Llama whose head is tied to its embedding, both code generators."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import fxquant
from fxquant import reference
from fxquant.errors import ConfigError
from fxquant.schemes import parse_integer_scheme

SCHEMES = ["w8a16", "w4a16-g64", "w2a16-g32", "w4a8-g64", "w4a8"]


def small_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=120,
        hidden_size=72,  # no multiple of the group sizes
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=18,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


def specification(model: nn.Module, name: str) -> nn.Module:
    """The model with every linear's weight rounded, and for a8 its input too: what the compiled model must compute."""
    scheme = parse_integer_scheme(name)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = reference.fake_quant_per_group(module.weight.detach(), scheme.weight_bits, scheme.group)
            module.weight = nn.Parameter(weight)  # a new Parameter: the embedding keeps the float weight
            if not scheme.is_weight_only:
                module.register_forward_pre_hook(lambda _, args: (reference.fake_quant_per_token(args[0], 8),))
    return model


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=ids).logits
    return out


# One scheme of each kind goes through Inductor: a compile takes seconds.
CASES = [*((scheme, "ops") for scheme in SCHEMES), ("w4a16-g64", "inductor"), ("w4a8-g64", "inductor")]


@pytest.mark.parametrize(("scheme", "codegen"), CASES)
def test_a_llama_with_a_tied_head(scheme: str, codegen: str) -> None:
    model = small_llama()
    ids = torch.randint(0, 120, (1, 7))
    compiled = torch.compile(model, backend="fxquant", options={"scheme": scheme, "codegen": codegen})
    y = logits(compiled, ids)
    report = fxquant.report(compiled)
    linears = [row for row in report.sites if row.kind == "linear"]
    assert len(linears) == 15
    assert {row.scheme for row in linears} == {scheme}
    assert report.unaccounted == ()
    wanted = logits(specification(model, scheme), ids)
    # a8: a float neighbour that rounds differently may flip a code, hence the room
    assert (y - wanted).abs().max() <= (1e-4 if "a16" in scheme else 2e-2) * wanted.abs().max()


@pytest.mark.parametrize("scheme", ["w4a16-g64", "w4a8-g64"])
def test_loading_a_state_dict_packs_again(scheme: str) -> None:
    model, other = small_llama(), small_llama()
    ids = torch.randint(0, 120, (2, 5))
    compiled = torch.compile(model, backend="fxquant", options={"scheme": scheme, "codegen": "ops"})
    before = logits(compiled, ids)
    model.load_state_dict(other.state_dict())
    after = logits(compiled, ids)
    again = torch.compile(other, backend="fxquant", options={"scheme": scheme, "codegen": "ops"})
    assert not torch.equal(before, after)
    assert torch.equal(after, logits(again, ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a8-g32"])
def test_half_precision_is_computed_in_float_and_cast_back(scheme: str, dtype: torch.dtype) -> None:
    linear = nn.Linear(70, 30).to(dtype)
    x = torch.randn(3, 70, dtype=dtype)
    with torch.no_grad():
        y = torch.compile(linear, backend="fxquant", options={"scheme": scheme, "codegen": "ops"})(x)
    codes, scale = reference.quantize_weight_groups(linear.weight, 4, 32)
    bias = linear.bias.detach().float()
    make = reference.linear_weight_only if "a16" in scheme else reference.linear_groups
    assert y.dtype == dtype
    assert torch.allclose(y.double(), make(x.float(), codes, scale, bias, 32).double(), rtol=1e-2, atol=1e-2)


def test_the_specification_holds_fake_quant_nodes(tmp_path: Any) -> None:
    linear = nn.Linear(64, 32)
    for scheme, wanted in (("w4a16-g32", (0, 0, 1)), ("w8a16", (0, 1, 0)), ("w4a8-g32", (1, 0, 1))):
        folder = tmp_path / scheme
        torch._dynamo.reset()
        with torch.no_grad():
            options: dict[str, Any] = {"scheme": scheme, "codegen": "ops", "dump": str(folder)}
            torch.compile(linear, backend="fxquant", options=options)(torch.randn(2, 64))
        (stage,) = [path for path in folder.rglob("*quantize*") if path.suffix == ".py"]
        text = stage.read_text()
        kinds = ("fake_quant_per_token", "fake_quant_per_channel", "fake_quant_per_group")
        assert tuple(text.count(f"{kind}.default(") for kind in kinds) == wanted


def test_names_that_are_no_scheme_say_what_to_write() -> None:
    with pytest.raises(ConfigError, match="a group has at least 2 weights; kernels know 16, 32, 64, 128, 256"):
        fxquant.FxQuantConfig(scheme="w4a16-g1")
    with pytest.raises(ConfigError, match=r"unknown scheme 'w9a16-g64'.*the nearest is 'w8a16'"):
        fxquant.FxQuantConfig(scheme="w9a16-g64")
    assert str(parse_integer_scheme("w4a16-g64")) == "w4a16-g64"
