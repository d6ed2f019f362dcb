"""Attention with the number formats of a calibration: what is computed, what is refused, what the report and the file say."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

import fxquant
from fxquant.calibration.attention import AttentionCalibration, attention_path
from fxquant.calibration.calibration import Calibration
from fxquant.calibration.site import SiteCalibration, StaticCoding
from fxquant.coding import Coding
from fxquant.format_schemes import FORMAT_SCHEMES
from fxquant.formats import AdaLog, Format, Log2, LogSqrt2, Sulq, TanQ, TwinSoftmax, Uniform
from fxquant.formats.log_codes import LogFormat
from fxquant.granularity import Granularity, PerChannel, PerTensor, PerToken
from fxquant.passes.fuse.attention import NO_KERNEL
from fxquant.passes.fuse.log_attention import CODES
from fxquant.planning import NO_CODING, NOT_CODED

HEADS = PerChannel(1)
PROBABILITIES: list[Format] = [
    Uniform(4),
    Log2(4),
    LogSqrt2(4),
    Sulq(4),
    TanQ(4),
    TwinSoftmax(4),
    AdaLog(4),
]


def coded(x: Tensor, form: Format, granularity: Granularity = PerTensor()) -> StaticCoding:  # noqa: B008 - frozen
    coding = Coding(form, granularity)
    return StaticCoding(coding, coding.fit(x))


def qkv(heads: int = 4, key_heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (2, heads, 19, 16), (2, key_heads, 21, 16), (2, key_heads, 21, 16)
    q, k, v = (torch.randn(shape) * torch.linspace(0.5, 2, shape[1])[:, None, None] for shape in shapes)
    return q, k, v


def known_of(q: Tensor, k: Tensor, v: Tensor, form: Format | None = None) -> AttentionCalibration:
    per = HEADS if q.dim() == 4 else PerTensor()
    p = coded(torch.rand(2, 19, 21), form or Log2(4))
    return AttentionCalibration(coded(q, Uniform(4), per), coded(k, Uniform(4), per), p, coded(v, Uniform(5), per))


def calibration(known: AttentionCalibration, path: str = "", **sites: SiteCalibration) -> Calibration:
    return Calibration("by hand", 1, {name.replace("_", ":"): site for name, site in sites.items()}, attention={path: known})


def compiled(function: Any, known: Calibration, **options: Any) -> Any:
    given: Any = {"codegen": "ops", "calibration": known, **options}
    return torch.compile(function, backend="fxquant", options=given)


def by_hand(
    q: Tensor, k: Tensor, v: Tensor, known: AttentionCalibration, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    def code(name: str, x: Tensor) -> Tensor:
        static = getattr(known, name)
        return x if static is None else static.coding.fake_quant(x, static.qparams)

    q, k, v = code("q", q), code("k", k), code("v", v)
    if q.dim() == 4:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    p = torch.softmax(scores if bias is None else scores + bias, -1).nan_to_num(nan=0.0)
    return code("p", p) @ v


@torch.no_grad()
@pytest.mark.parametrize("form", PROBABILITIES, ids=lambda form: form.name)
def test_the_graph_is_the_specification(form: Format) -> None:
    q, k, v = qkv()
    known = known_of(q, k, v, form)
    fast = compiled(lambda q, k, v: scaled_dot_product_attention(q, k, v) * 2, calibration(known))
    torch.testing.assert_close(fast(q, k, v), by_hand(q, k, v, known) * 2, atol=1e-5, rtol=1e-5)
    sites, kernel = fxquant.report(fast).sites, "attention_log" if isinstance(form, LogFormat) else None
    assert [(row.kind, row.scheme, row.kernel, row.error_class) for row in sites] == [
        ("attention.qk", "affine4/affine4", kernel, "QUANTIZED"),
        ("attention.pv", f"{form.name}/affine5", kernel, "QUANTIZED"),
    ]
    assert {str(row.reason).startswith(NO_KERNEL) for row in sites} == {kernel is None}


@torch.no_grad()
@pytest.mark.parametrize("form", [Log2(4), AdaLog(4)], ids=lambda form: form.name)
def test_inductor_computes_the_same(form: Format) -> None:
    q, k, v = qkv()
    known = known_of(q, k, v, form)

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 19, 64)

    wanted = by_hand(q, k, v, known, torch.full((19, 21), -math.inf).triu(1)).transpose(1, 2).reshape(2, 19, 64)
    torch.testing.assert_close(compiled(block, calibration(known), codegen="inductor")(q, k, v), wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("case", ["causal", "bool", "hidden", "float", "scale", "groups", "three axes"])
def test_masks_scales_groups_and_axes(case: str) -> None:
    q, k, v = qkv(4, 2) if case == "groups" else qkv()
    if case == "three axes":
        q, k, v = q[:, 0], k[:, 0], v[:, 0]
    seen = torch.rand(2, 1, 19, 21) > 0.4
    seen[0, :, 3] = case != "hidden"
    given: dict[str, dict[str, Any]] = {
        "causal": {"is_causal": True},
        "bool": {"attn_mask": seen},
        "hidden": {"attn_mask": seen},
        "float": {"attn_mask": torch.randn(19, 21)},
        "scale": {"scale": 0.4},
        "groups": {"enable_gqa": True},
        "three axes": {},
    }
    bias = {
        "causal": torch.full((19, 21), -math.inf).triu(1),
        "bool": torch.where(seen, 0.0, -math.inf),
        "hidden": torch.where(seen, 0.0, -math.inf),
        "float": given["float"]["attn_mask"],
    }
    known = known_of(q, k, v)
    fast = compiled(lambda q, k, v: scaled_dot_product_attention(q, k, v, **given[case]), calibration(known))
    wanted = by_hand(q, k, v, known, bias.get(case), given[case].get("scale"))
    torch.testing.assert_close(fast(q, k, v), wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_every_length_shares_one_graph() -> None:
    q, k, v = qkv()
    known = known_of(q, k, v)
    fast = compiled(lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True), calibration(known))
    for n in (19, 7, 12):
        bias = torch.full((n, n), -math.inf).triu(1)
        parts = q[:, :, :n].clone(), k[:, :, :n].clone(), v[:, :, :n].clone()
        for part in parts:
            torch._dynamo.mark_dynamic(part, 2)
        torch.testing.assert_close(fast(*parts), by_hand(*parts, known, bias), atol=1e-5, rtol=1e-5)


class Attend(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.attend, self.out = nn.Linear(32, 96), Attend(), nn.Linear(32, 32)

    def split(self, y: Tensor) -> tuple[Tensor, ...]:
        return y.view(2, 9, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.attend(*self.split(self.qkv(x)))
        return torch.relu(self.out(mixed.transpose(1, 2).reshape(2, 9, 32)))


@torch.no_grad()
@pytest.mark.parametrize("codegen", ["ops", "inductor"])
def test_attention_and_linears_read_their_own_inputs(codegen: str) -> None:
    model, x, fp8 = Block(), torch.randn(2, 9, 32), FORMAT_SCHEMES["fp8"].weight
    first = coded(x, Uniform(8))
    y = linear(first.coding.fake_quant(x, first.qparams), fp8.fake_quant(model.qkv.weight), model.qkv.bias)
    q, k, v = model.split(y)
    known = known_of(q, k, v)
    mixed = by_hand(q, k, v, known).transpose(1, 2).reshape(2, 9, 32)
    last = coded(mixed, Uniform(8))
    wanted = linear(last.coding.fake_quant(mixed, last.qparams), fp8.fake_quant(model.out.weight), model.out.bias).relu()
    sites = {
        "qkv_linear": SiteCalibration("fp8", (96, 32), first),
        "out_linear": SiteCalibration("fp8", (32, 32), last),
    }
    fast = compiled(model, calibration(known, "attend", **sites), scheme="fp8", codegen=codegen)
    torch.testing.assert_close(fast(x), wanted, atol=2e-2, rtol=1e-3)
    schemes = {row.name: row.scheme for row in fxquant.report(fast).sites}
    assert schemes["attend:attention.qk"] == "affine4/affine4"
    assert schemes["qkv:linear"] == schemes["out:linear"] == "fp8 static"


@torch.no_grad()
def test_operands_without_a_coding_stay_float() -> None:
    q, k, v = qkv()
    known = AttentionCalibration(v=coded(v, Uniform(4)))
    fast = compiled(lambda q, k, v: scaled_dot_product_attention(q, k, v) - 1, calibration(known))
    torch.testing.assert_close(fast(q, k, v), by_hand(q, k, v, known) - 1, atol=1e-5, rtol=1e-5)
    assert [(row.scheme, row.reason) for row in fxquant.report(fast).sites] == [
        (None, NO_CODING),
        ("float/affine4", f"{NO_KERNEL}; {CODES}"),
    ]


@torch.no_grad()
def test_an_attention_that_a_calibration_could_not_code_says_so() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(32, 96)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
            many = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return scaled_dot_product_attention(many, many, many)  # of three axes

    model, x = Model().eval(), torch.randn(2, 5, 32)
    known = fxquant.calibrate(model, [x], scheme="w4a4", method="repq")
    assert [*known.attention] == [""]
    fast = compiled(model, known, scheme="w4a4")
    fast(x)
    reasons = [str(row.reason) for row in fxquant.report(fast).sites if row.kind == "attention.qk"]
    assert [NOT_CODED in reason for reason in reasons] == [False, True]


@torch.no_grad()
def test_what_the_options_say_wins() -> None:
    q, k, v = qkv()
    known = known_of(q, k, v)
    half = compiled(
        lambda q, k, v: scaled_dot_product_attention(q, k, v) + 1, calibration(known), sites={":attention.qk": "float"}
    )
    torch.testing.assert_close(half(q, k, v), by_hand(q, k, v, known.without(["attention.qk"])) + 1, atol=1e-5, rtol=1e-5)
    named = compiled(lambda q, k, v: scaled_dot_product_attention(q, k, v) + 2, calibration(known), attention="qk8")
    named(q, k, v)
    assert {row.kernel for row in fxquant.report(named).sites} == {"attention_int"}
    off = compiled(lambda q, k, v: scaled_dot_product_attention(q, k, v) + 3, calibration(known), attention="off")
    torch.testing.assert_close(off(q, k, v), scaled_dot_product_attention(q, k, v) + 3)


def refused() -> dict[str, tuple[AttentionCalibration, torch.dtype]]:
    q, k, v = qkv()
    few = AttentionCalibration(q=coded(q[:, :3], Uniform(4), HEADS))
    tokens = AttentionCalibration(k=coded(k, Uniform(4), PerToken()))
    return {
        "the calibration has 3 blocks of q, per channel of axis 1; this attention has 4": (few, torch.float32),
        "static qparams of k must be per tensor or per channel, not per token": (tokens, torch.float32),
        "q, k and v must be float32 for the attention kernel": (known_of(q, k, v), torch.float64),
    }


@torch.no_grad()
@pytest.mark.parametrize("sentence", refused())
def test_a_refused_attention_keeps_its_operator_and_says_why(sentence: str) -> None:
    known, dtype = refused()[sentence]
    x = torch.randn(2, 4, 19, 16, dtype=dtype)

    def function(x: Tensor) -> Tensor:
        return scaled_dot_product_attention(x, x, x)

    fast = compiled(function, calibration(known))
    torch.testing.assert_close(fast(x), function(x))
    assert {row.reason for row in fxquant.report(fast).sites} == {sentence}


def test_codings_survive_a_file(tmp_path: Path) -> None:
    q, k, v = qkv()
    for known in (known_of(q, k, v), known_of(q, k, v, AdaLog(4)), AttentionCalibration(v=coded(v, Uniform(4)))):
        for path in ("", "layers.0.attn#2"):
            written = calibration(known, path)
            written.save(tmp_path / "file.safetensors")
            read = Calibration.load(tmp_path / "file.safetensors")
            assert read == written
            assert read.attention[path] == known
    assert written != Calibration("by hand", 1, {})


@pytest.mark.parametrize(
    ("site", "path"),
    [(":attention.qk", ""), ("a.b:attention.qk", "a.b"), ("a.b:attention.pv#2", "a.b#2")],
)
def test_the_path_of_an_attention(site: str, path: str) -> None:
    assert attention_path(site) == path
