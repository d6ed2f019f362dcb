"""From a calibration's codings to fxquant::attention_log: what is fused, what is refused, what the report says."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import fxquant
from fxquant.calibration.attention import AttentionCalibration
from fxquant.calibration.calibration import Calibration
from fxquant.calibration.recipes.attention import SeenAttention, choose_attention
from fxquant.calibration.site import StaticCoding
from fxquant.coding import Coding
from fxquant.formats import AdaLog, Format, Log2, LogSqrt2, TwinSoftmax, Uniform
from fxquant.granularity import Granularity, PerChannel, PerTensor
from fxquant.passes.fuse.attention import NO_KERNEL
from fxquant.passes.fuse.log_attention import CODES, arguments
from fxquant.passes.quantize.attention import attention as specification

HEADS, WHOLE = PerChannel(1), PerTensor()


def coded(x: Tensor, form: Format, granularity: Granularity = WHOLE) -> StaticCoding:
    coding = Coding(form, granularity)
    return StaticCoding(coding, coding.fit(x))


def qkv(heads: int = 4, key_heads: int = 4, n: int = 19, m: int = 21) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (2, heads, n, 16), (2, key_heads, m, 16), (2, key_heads, m, 24)
    q, k, v = (torch.randn(shape) * torch.linspace(0.5, 2, shape[1])[:, None, None] for shape in shapes)
    return q, k, v


def known_of(q: Tensor, k: Tensor, v: Tensor, form: Format, per: Granularity = HEADS) -> AttentionCalibration:
    p = coded(torch.rand(2, q.shape[1], 19, 21), form)
    return AttentionCalibration(coded(q, Uniform(6), per), coded(k, Uniform(6), per), p, coded(v, Uniform(5), per))


def compiled(function: Any, known: AttentionCalibration, **options: Any) -> Any:
    given = {"codegen": "ops", "calibration": Calibration("by hand", 1, {}, attention={"": known}), **options}
    return torch.compile(function, backend="fxquant", options=given)


def operator(
    q: Tensor, k: Tensor, v: Tensor, known: AttentionCalibration, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    given = arguments(q.dim(), known, known.tensors())
    return torch.ops.fxquant.attention_log(q, k, v, mask, causal, None, *given)  # type: ignore[no-any-return]


@torch.no_grad()
@pytest.mark.parametrize("codegen", ["ops", "inductor"])
@pytest.mark.parametrize("form", [Log2(4), LogSqrt2(4), AdaLog(4, "reserve_top")], ids=lambda form: form.name)
def test_the_graph_calls_the_kernel(form: Format, codegen: str) -> None:
    q, k, v = qkv()
    known = known_of(q, k, v, form)

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q + 1, k, v, is_causal=True).transpose(1, 2).reshape(2, 19, 96) * 2

    fast = compiled(block, known, codegen=codegen)
    wanted = operator(q + 1, k, v, known, causal=True).transpose(1, 2).reshape(2, 19, 96) * 2
    assert torch.equal(fast(q, k, v), wanted)
    assert [(row.kind, row.scheme, row.kernel, row.error_class) for row in fxquant.report(fast).sites] == [
        ("attention.qk", "affine6/affine6", "attention_log", "QUANTIZED"),
        ("attention.pv", f"{form.name}/affine5", "attention_log", "QUANTIZED"),
    ]


@torch.no_grad()
@pytest.mark.parametrize(
    ("form", "qparams", "how"),
    [
        (Log2(4), {}, "from exact scores of codes; their products with codes of v by exact shifts and adds, in one sum"),
        (LogSqrt2(4), {}, "from exact scores of codes; their products with codes of v by exact shifts and adds, in 2 sums"),
        (AdaLog(8), {"base": torch.full((1, 1), 3.0)}, "with codes of v by shifts and adds in 2 sums, rounded to float32"),
    ],
    ids=["one", "two", "rounded"],
)
def test_the_report_says_how_sums_are_made(form: Format, qparams: dict[str, Tensor], how: str) -> None:
    q, k, v = qkv(m=900)
    p = StaticCoding(Coding(form, WHOLE), {"scale": torch.ones(1, 1), **qparams})
    known = AttentionCalibration(coded(q, Uniform(6)), coded(k, Uniform(6)), p, coded(v, Uniform(8)))
    fast = compiled(lambda q, k, v: scaled_dot_product_attention(q, k, v) + 1, known)
    assert torch.equal(fast(q, k, v), operator(q, k, v, known) + 1)
    assert all(str(row.reason).endswith(how) for row in fxquant.report(fast).sites)


@torch.no_grad()
def test_masks_and_shared_heads() -> None:
    q, k, v = qkv(4, 2)
    seen = torch.rand(2, 1, 19, 21) > 0.4
    for mask in (seen, torch.randn(19, 21)):
        known = known_of(q, k, v, Log2(4))
        grouped = compiled(lambda q, k, v, m: scaled_dot_product_attention(q, k, v, m, enable_gqa=True) + 1, known)
        assert torch.equal(grouped(q, k, v, mask), operator(q, k, v, known, mask) + 1)

    def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)) + 2

    wide = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    for per in (WHOLE, HEADS):
        known = known_of(q, *wide, Log2(4), per)
        assert torch.equal(compiled(repeated, known)(q, k, v), operator(q, *wide, known) + 2)


@torch.no_grad()
def test_every_length_shares_one_graph() -> None:
    q, k, v = qkv()
    known = known_of(q, k, v, AdaLog(4))
    fast = compiled(lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True), known)
    for n in (19, 7, 12):
        parts = q[:, :, :n].clone(), k[:, :, :n].clone(), v[:, :, :n].clone()
        for part in parts:
            torch._dynamo.mark_dynamic(part, 2)
        assert torch.equal(fast(*parts), operator(*parts, known, causal=True))
    assert all(str(row.reason).endswith("by exact shifts and adds") for row in fxquant.report(fast).sites)


def refused() -> dict[str, AttentionCalibration]:
    q, k, v = qkv()
    whole = known_of(q, k, v, Log2(4))
    form = Coding(Log2(4), PerChannel(0))
    batch = StaticCoding(form, {"scale": torch.ones(2, 1)})
    return {
        CODES: known_of(q, k, v, Log2(4, "saturate")),
        CODES + " ": known_of(q, k, v, TwinSoftmax(4)),
        "a kernel needs uniform codes of v": AttentionCalibration(whole.q, whole.k, whole.p),
        "a kernel needs uniform codes of both q and k, or of neither": AttentionCalibration(whole.q, None, whole.p, whole.v),
        "a kernel needs qparams of q, k and the weights per tensor or per head": AttentionCalibration(p=batch, v=whole.v),
        "a kernel needs qparams of v per tensor, per head or per channel": AttentionCalibration(
            p=whole.p, v=coded(v, Uniform(8), PerChannel(2))
        ),
    }


@torch.no_grad()
@pytest.mark.parametrize("sentence", refused())
def test_what_has_no_kernel_is_the_specification_and_says_why(sentence: str) -> None:
    q, k, v = qkv()
    known = refused()[sentence]
    fast = compiled(lambda q, k, v: scaled_dot_product_attention(q, k, v) * 3, known)
    wanted = specification({"q": q, "k": k, "v": v, **known.tensors()}, known) * 3
    torch.testing.assert_close(fast(q, k, v), wanted, atol=1e-5, rtol=1e-5)
    reasons = {str(row.reason) for row in fxquant.report(fast).sites if row.scheme}
    assert reasons == {f"{NO_KERNEL}; {sentence.strip()}"}


@torch.no_grad()
@pytest.mark.parametrize("method", ["fq-vit", "repq", "adalog"])
@pytest.mark.parametrize("bits", [4, 6])
def test_published_codings_run_in_the_kernel(method: str, bits: int) -> None:
    """Within a few codes next to thresholds of the specification, as far from exact attention as it."""
    q, k, v = qkv(n=40, m=40)
    known = choose_attention(SeenAttention("here", q, k, v), method, bits)
    fast = compiled(lambda q, k, v: scaled_dot_product_attention(q, k, v) - 1, known)
    got = fast(q, k, v) + 1
    assert {row.kernel for row in fxquant.report(fast).sites} == {"attention_log"}
    exact, slow = scaled_dot_product_attention(q, k, v), specification({"q": q, "k": k, "v": v, **known.tensors()}, known)
    far = ~torch.isclose(got, slow, atol=1e-4, rtol=1e-4)
    assert float(far.double().mean()) < 0.02
    assert float((got - exact).norm() / (slow - exact).norm()) == pytest.approx(1, abs=0.02)
    assert not math.isnan(float(got.sum()))
