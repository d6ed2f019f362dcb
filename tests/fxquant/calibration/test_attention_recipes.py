"""What each published method chooses for attention and for the input after GELU."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, scaled_dot_product_attention

import fxquant
from fxquant.calibration.attention import AttentionCalibration
from fxquant.calibration.calibration import Calibration
from fxquant.calibration.recipes import attention as recipes
from fxquant.calibration.recipes.attention import SeenAttention, choose_attention
from fxquant.calibration.recipes.attention_samples import LENGTHS, AttentionSampler
from fxquant.calibration.recipes.gelu import choose_after_gelu
from fxquant.calibration.study import Study
from fxquant.config import override_options
from fxquant.errors import CalibrationError
from fxquant.formats import AdaLog, TwinGelu

METHODS = list(recipes.METHODS)
OTHERS = [name for name in METHODS if name != "minmax"]
FORMATS = {
    "minmax": ("affine4", "affine4"),
    "fq-vit": ("affine4", "log2-4-ref_extra"),
    "repq": ("affine4", "log-sqrt2-4-ref_extra"),
    "repquant": ("affine4", "log-sqrt2-4-ref_extra"),
    "i&s": ("affine4", "sulq-4"),
    "dopq": ("affine4", "tanq-4"),
    "ptq4vit": ("symmetric4", "twin-softmax-4"),
    "adalog": ("affine4", "adalog-4-ref_extra"),
}


def seen(heads: int = 4, key_heads: int = 4, **how: Any) -> SeenAttention:
    shapes = (2, heads, 48, 16), (2, key_heads, 48, 16), (2, key_heads, 48, 16)
    q, k, v = (torch.randn(shape) * torch.linspace(0.7, 2, shape[1])[:, None, None] for shape in shapes)
    return SeenAttention("site", q, k, v, **how)


def error_of_p(found: SeenAttention, known: AttentionCalibration) -> float:
    assert known.p is not None
    value = found.v.repeat_interleave(found.sharing, 1)
    p = known.p.coding.fake_quant(found.p, known.p.qparams)
    return float(((p - found.p) @ value).square().mean())


@pytest.mark.parametrize("method", METHODS)
def test_every_operand_gets_a_coding_of_the_method(method: str) -> None:
    found = seen()
    known = choose_attention(found, method, 4)
    assert list(known.codings) == ["q", "k", "p", "v"]
    uniform, p = FORMATS[method]
    assert known.schemes == {"attention.qk": f"{uniform}/{uniform}", "attention.pv": f"{p}/{uniform}"}
    blocks = 4 if method in ("ptq4vit", "adalog") else 1
    assert all(value.shape == (blocks, 1) for name in "qkv" for value in known.codings[name].qparams.values())


@pytest.mark.parametrize("method", [name for name in OTHERS if name != "i&s"])  # whose codes are not better here
def test_methods_code_probabilities_of_many_keys_better_than_their_extent_does(method: str) -> None:
    q, k, v = torch.randn(2, 2, 40, 16) * 2, torch.randn(2, 2, 197, 16), torch.randn(2, 2, 197, 16)
    found = SeenAttention("site", q, k, v)
    base, known = choose_attention(found, "minmax", 4), choose_attention(found, method, 4)
    assert error_of_p(found, known) < error_of_p(found, base)


def test_the_shift_of_sulq_is_searched() -> None:
    found = seen()
    known = choose_attention(found, "i&s", 4).p
    assert known is not None
    errors = [
        float((known.coding.fake_quant(found.p, qparams) - found.p).square().mean())
        for qparams in (known.qparams, known.coding.fit(found.p))
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("method", ["ptq4vit", "adalog"])
def test_searched_heads_multiply_better_than_whole_tensors(method: str) -> None:
    found = seen()
    wanted = found.q @ found.k.transpose(-2, -1)
    errors = []
    for name in ("minmax", method):
        known = choose_attention(found, name, 4).codings
        q, k = (known[side].coding.fake_quant(getattr(found, side), known[side].qparams) for side in "qk")
        errors.append(float((q @ k.transpose(-2, -1) - wanted).square().mean()))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("method", METHODS)
def test_heads_that_share_keys_share_qparams(method: str) -> None:
    found = seen(4, 2, is_causal=True, scale=0.3)
    for name, static in choose_attention(found, method, 4).codings.items():
        for value in static.qparams.values():
            assert len(value) in (1, 4 if name in "qp" else 2)
            if len(value) == 4:
                assert torch.equal(value[0::2], value[1::2])


def test_hidden_keys_have_no_probability() -> None:
    mask = torch.ones(2, 1, 1, 48, dtype=torch.bool)
    mask[1, ..., 30:] = False
    assert not bool(seen(mask=mask).p[1, ..., 30:].any())


def test_an_unknown_method_and_odd_heads_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"site: unknown method 'x' for attention; known: minmax"):
        choose_attention(seen(), "x", 4)
    with pytest.raises(CalibrationError, match="multiple"):
        seen(3, 2)
    with pytest.raises(CalibrationError, match="four axes"):
        SeenAttention("site", *(torch.ones(2, 3, 4),) * 3)


class Attention(nn.Module):
    """That of a vision transformer, random."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4).unbind(0)
        out: Tensor = self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


def studied(model: nn.Module, x: Tensor) -> dict[str, SeenAttention]:
    samplers: dict[str, AttentionSampler] = {}
    study = Study(model, override_options(None, scheme="w8a8", calibration=None))
    study.watch_attention = lambda path, args: samplers.setdefault(path, AttentionSampler(path)).observe(args)
    study(x)
    return {path: sampler.seen() for path, sampler in samplers.items()}


@torch.no_grad()
def test_every_method_changes_the_codes_of_a_studied_site() -> None:
    model, x = Attention().eval(), torch.randn(2, 33, 64) * 2
    model.qkv.weight *= 3
    ((path, found),) = studied(model, x).items()
    wanted, outputs = model(x), {}
    for method in METHODS:
        known = Calibration(method, 1, {}, attention={path: choose_attention(found, method, 4)})
        options: Any = {"codegen": "ops", "scheme": "float", "calibration": known}
        torch._dynamo.reset()
        fast = torch.compile(model, backend="fxquant", options=options)
        outputs[method] = fast(x)
        schemes = {row.scheme for row in fxquant.report(fast).sites if row.kind.startswith("attention")}
        assert schemes == set(known.attention[path].schemes.values())
    for method in OTHERS:
        assert not torch.equal(outputs[method], outputs["minmax"])
        assert float((outputs[method] - wanted).norm()) < float(wanted.norm())


def test_a_sampler_keeps_what_belongs_together() -> None:
    sampler = AttentionSampler("site", capacity=3)
    for rows in (5, 7, 7, 7):
        q = torch.randn(2, 4, rows, 8)
        mask = torch.rand(2, 1, rows, rows) > 0.5
        sampler.observe({"q": q, "k": q + 1, "v": q + 2, "mask": mask, "is_causal": False, "scale": 0.5})
    found = sampler.seen()
    assert found.q.shape == (3, 4, 7, 8)
    torch.testing.assert_close(found.k, found.q + 1)
    torch.testing.assert_close(found.v, found.q + 2)
    assert found.mask is not None
    assert found.mask.shape == (3, 1, 7, 7)
    assert found.scale == 0.5
    assert bool((found.p.sum(-1) < 1.001).all())


def test_a_sampler_does_not_grow_with_the_lengths_that_it_sees() -> None:
    sampler = AttentionSampler("site", capacity=2)
    for rows in (9, 9, *range(20, 60), 9):
        q = torch.full((1, 2, rows, 4), float(rows))
        sampler.observe({"q": q, "k": q, "v": q, "mask": None, "is_causal": False, "scale": None})
    assert len(sampler.states()) == 3 * LENGTHS + 1
    assert sampler.seen().q.shape == (2, 2, 9, 4)


def test_a_sampler_without_data_or_with_three_axes_says_so() -> None:
    with pytest.raises(CalibrationError, match="no data were seen"):
        AttentionSampler("site").seen()
    x = torch.ones(2, 3, 4)
    with pytest.raises(CalibrationError, match="four axes, not for 3"):
        AttentionSampler("site").observe({"q": x, "k": x, "v": x, "mask": None, "is_causal": False, "scale": None})


def after_gelu() -> tuple[Tensor, Tensor]:
    return gelu(torch.randn(200, 48) * torch.linspace(0.5, 2, 48)), torch.randn(24, 48)


@pytest.mark.parametrize(("method", "form"), [("ptq4vit", TwinGelu), ("adalog", AdaLog)])
def test_the_search_after_gelu_beats_the_fit_of_its_own_format(method: str, form: type) -> None:
    x, weight = after_gelu()
    found = choose_after_gelu("fc2", x, weight, method, 4)
    assert isinstance(found.coding.format, form)
    errors = [
        float(linear(found.coding.fake_quant(x, qparams) - x, weight).square().mean())
        for qparams in (found.qparams, found.coding.fit(x))
    ]
    assert errors[0] < errors[1]


def test_adalog_codes_gelu_outputs_better_than_their_extent_does() -> None:
    x, weight = after_gelu()
    errors = []
    for name in ("adalog", "minmax"):
        static = choose_after_gelu("fc2", x, weight, name, 4)
        errors.append(float(linear(static.coding.fake_quant(x, static.qparams) - x, weight).square().mean()))
    assert errors[0] < errors[1]


def test_what_is_no_gelu_output_is_refused() -> None:
    x, weight = after_gelu()
    with pytest.raises(CalibrationError, match="fc2: the input reaches -1, below the minimum of GELU"):
        choose_after_gelu("fc2", torch.cat([x, -torch.ones(1, 48)]), weight, "adalog", 4)
    with pytest.raises(CalibrationError, match="unknown method 'x' after GELU"):
        choose_after_gelu("fc2", x, weight, "x", 4)
