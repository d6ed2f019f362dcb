"""Attention sites in compiled graphs: taken with what the graph says of masks, groups and layouts, or refused and told why."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import ConfigError
from fxquant.reporting.report import Report

scaled_dot_product_attention: Callable[..., Tensor] = torch.nn.functional.scaled_dot_product_attention
REAL = "float attention with no N x M buffer"
CODEGENS = ["ops", "inductor"]


@torch.no_grad()
def check(function: Any, *args: Tensor, **options: Any) -> Report:
    """The report of a function that, compiled, gives what it gives eagerly."""
    gc.collect()  # what an earlier test compiled
    compiled = torch.compile(function, backend="fxquant", options=options)
    got, wanted = compiled(*args), function(*args)
    assert got.shape == wanted.shape
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-6)
    return fxquant.report(compiled)


def qkv(heads: int = 4, key_heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, heads, 39, 16), torch.randn(2, key_heads, 41, 16), torch.randn(2, key_heads, 41, 16)


def kernels(report: Report) -> list[str | None]:
    return [row.kernel for row in report.sites if row.kind.startswith("attention")]


def repeat_kv(x: Tensor, count: int) -> Tensor:
    batch, heads, keys, size = x.shape
    return x[:, :, None, :, :].expand(batch, heads, count, keys, size).reshape(batch, heads * count, keys, size)


@pytest.mark.parametrize("codegen", CODEGENS)
def test_an_attention_site_is_taken_and_told(codegen: str) -> None:
    report = check(lambda q, k, v: scaled_dot_product_attention(q, k, v) * 2, *qkv(), codegen=codegen)
    assert [(row.kind, row.kernel, row.error_class, row.reason, row.scheme) for row in report.sites] == [
        ("attention.qk", "attention", "REAL", REAL, None),
        ("attention.pv", "attention", "REAL", REAL, None),
    ]


@pytest.mark.parametrize("codegen", CODEGENS)
def test_heads_side_by_side_are_read_without_a_copy(codegen: str) -> None:
    def block(x: Tensor) -> Tensor:
        q, k, v = x.view(2, 39, 3, 4, 16).permute(2, 0, 3, 1, 4).unbind(0)
        return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 39, 64)

    assert kernels(check(block, torch.randn(2, 39, 192), codegen=codegen)) == ["attention"] * 2


@pytest.mark.parametrize("codegen", CODEGENS)
@pytest.mark.parametrize("way", ["enable_gqa", "repeat_kv", "repeat_interleave"])
def test_groups_of_heads_are_read_where_they_are(way: str, codegen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    fuse = fxquant.passes.fuse.attention.FUSION

    def spy(node: Any, verdict: Any, fake_mode: Any) -> Any:
        made = fuse.fuse(node, verdict, fake_mode)
        source: Any = made if made.target is torch.ops.fxquant.attention.default else made.args[0]
        seen.append(tuple(source.args[1].meta["val"].shape))
        return made

    monkeypatch.setitem(fxquant.passes.fuse.FUSIONS, "attention", type(fuse)(fuse.decide, spy))

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if way == "enable_gqa":
            return scaled_dot_product_attention(q, k, v, enable_gqa=True)
        if way == "repeat_kv":
            return scaled_dot_product_attention(q, repeat_kv(k, 2), repeat_kv(v, 2))
        return scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, dim=1))

    assert kernels(check(function, *qkv(4, 2), codegen=codegen)) == ["attention"] * 2
    assert seen == [(2, 2, 41, 16)]


@pytest.mark.parametrize("mask", ["bool", "float"])
def test_masks_and_scales_are_kept(mask: str) -> None:
    seen = torch.rand(39, 41) > 0.3
    given = seen if mask == "bool" else torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    function = lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=given, scale=0.2)  # noqa: E731
    assert kernels(check(function, *qkv(), codegen="ops")) == ["attention"] * 2


def test_written_attention_is_taken_too() -> None:
    function = lambda q, k, v: torch.softmax(q @ k.transpose(-2, -1) * 0.25, -1) @ v  # noqa: E731
    assert kernels(check(function, *qkv(), codegen="ops")) == ["attention"] * 2


def test_every_size_shares_one_graph() -> None:
    compiled = torch.compile(
        lambda q: scaled_dot_product_attention(q, q, q).sum(-1), backend="fxquant", dynamic=True, options={"codegen": "ops"}
    )
    with torch.no_grad():
        for n in (3, 40, 200):
            q = torch.randn(2, 3, n, 16)
            torch.testing.assert_close(compiled(q), scaled_dot_product_attention(q, q, q).sum(-1), rtol=1e-5, atol=1e-5)
    assert kernels(fxquant.report(compiled)) == ["attention"] * 2


REFUSED = {
    "head sizes must lie between 1 and 256, where the kernel was measured": (torch.randn(1, 2, 4, 260),) * 3,
    "q, k and v must be float32 for the attention kernel": (torch.randn(1, 2, 4, 8, dtype=torch.float64),) * 3,
    "q, k and v must share their batch size": (torch.randn(2, 2, 4, 8), *(torch.randn(1, 2, 4, 8),) * 2),
    "fewer than 98304 products of q and k: the operator of PyTorch is as fast": (torch.randn(1, 12, 8, 64),) * 3,
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_a_refused_site_says_why(sentence: str) -> None:
    report = check(scaled_dot_product_attention, *REFUSED[sentence], codegen="ops")
    assert [row.reason for row in report.sites] == [sentence] * 2
    assert kernels(report) == [None, None]


def test_dropout_is_refused() -> None:
    compiled = torch.compile(
        lambda q: scaled_dot_product_attention(q, q, q, dropout_p=0.5), backend="fxquant", options={"codegen": "ops"}
    )
    with torch.no_grad():
        compiled(torch.randn(1, 2, 4, 8))
    assert {row.reason for row in fxquant.report(compiled).sites} == {"attention with dropout keeps the operator of PyTorch"}


def test_it_can_be_switched_off() -> None:
    report = check(scaled_dot_product_attention, *qkv(), codegen="ops", attention="off")
    assert [row.reason for row in report.sites] == ["the option attention='off' keeps the operator of PyTorch"] * 2
    with pytest.raises(ConfigError, match="unknown attention 'of'"):
        fxquant.FxQuantConfig(attention="of")


SCHEMES = {"qk8": (8, 0), "qk6": (6, 0), "qk8-pv8": (8, 8), "qk6-pv8": (6, 8)}
FLOAT_V = "exact integer sums of {}-bit q and centred k; softmax and v in float"
CODED_V = "exact integer sums of {}-bit q and centred k, and of 8-bit weights and v"


@torch.no_grad()
def quantized(function: Any, *args: Tensor, **options: Any) -> tuple[Tensor, Report]:
    """The result and the report of a compiled function."""
    gc.collect()  # what an earlier test compiled
    compiled = torch.compile(function, backend="fxquant", options=options)
    return compiled(*args), fxquant.report(compiled)


@pytest.mark.parametrize("codegen", CODEGENS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_is_taken_and_told(scheme: str, codegen: str) -> None:
    q, k, v = qkv()
    got, report = quantized(scaled_dot_product_attention, q, k, v, attention=scheme, codegen=codegen)
    bits = SCHEMES[scheme]
    assert torch.equal(got, torch.ops.fxquant.attention_int(q, k, v, None, False, None, *bits))
    reason = (CODED_V if bits[1] else FLOAT_V).format(bits[0])
    assert [(row.kind, row.kernel, row.error_class, row.reason, row.scheme) for row in report.sites] == [
        ("attention.qk", "attention_int", "QUANTIZED", reason, f"qk{bits[0]}"),
        ("attention.pv", "attention_int", "QUANTIZED", reason, "pv8" if bits[1] else None),
    ]
    assert f"qk{bits[0]}" in str(report)


class Block(nn.Module):
    """Two attention layers with linears of their own, as encoders have them."""

    def __init__(self) -> None:
        super().__init__()
        self.first_attention, self.second = nn.ModuleList(), nn.ModuleList()
        for layers in (self.first_attention, self.second):
            layers.extend(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layers in (self.first_attention, self.second):
            q, k, v = (layer(x).view(2, 65, 4, 16).transpose(1, 2) for layer in layers[:3])
            x = x + layers[3](scaled_dot_product_attention(q, k, v, scale=0.25).transpose(1, 2).flatten(2))
        return x


def schemes(report: Report) -> list[str | None]:
    return [row.scheme for row in report.sites if row.kind.startswith("attention")]


@torch.no_grad()
def test_a_block_keeps_its_direction() -> None:
    block, x = Block().eval(), torch.randn(2, 65, 64)
    for scheme in SCHEMES:
        got, report = quantized(block, x, attention=scheme, scheme="float", codegen="ops")
        assert kernels(report) == ["attention_int"] * 4
        added, wanted = got - x, block(x) - x
        assert float(torch.cosine_similarity(added.flatten(), wanted.flatten(), dim=0)) > 0.999


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"sites": {"*": "qk6-pv8"}}, ["qk6", "pv8"] * 2),
        ({"attention": "qk8", "sites": {"*:attention.qk*": "float"}}, [None] * 4),
        ({"attention": "qk8", "sites": {"*:attention.qk#2": "qk6"}}, ["qk8", None, "qk6", None]),
        ({"attention": "off", "sites": {"*:attention.??": "qk6"}}, ["qk6", None, None, None]),
        ({"sites": {"*": "w8a8", "*:attention*": "qk8-pv8"}}, ["qk8", "pv8"] * 2),
        ({"sites": {"*:attention.pv*": "float", "*": "qk6-pv8"}}, ["qk6", None] * 2),
    ],
    ids=str,
)
def test_sites_have_settings_of_their_own(options: dict[str, Any], wanted: list[str | None]) -> None:
    def function(x: Tensor) -> Tensor:
        return scaled_dot_product_attention(scaled_dot_product_attention(x, x, x), x, x)

    _, report = quantized(function, torch.randn(2, 4, 65, 16), codegen="ops", **options)
    assert schemes(report) == wanted


def test_a_pattern_of_attention_leaves_linears_alone() -> None:
    block, x = Block().eval(), torch.randn(2, 65, 64)
    _, report = quantized(block, x, codegen="ops", scheme="w8a8", sites={"*": "qk6"})
    assert {row.scheme for row in report.sites if row.kind == "linear"} == {"w8a8"}
    assert schemes(report) == ["qk6", None] * 2
    with pytest.raises(Exception, match=r"the pattern 'second\.0' matches no attention, and its scheme is for nothing else"):
        quantized(block, x, codegen="ops", sites={"second.0": "qk6"})


def test_weights_alone_have_no_scheme() -> None:
    _, report = quantized(scaled_dot_product_attention, *qkv(), codegen="ops", sites={"*:attention.pv": "qk8-pv8"})
    assert kernels(report) == ["attention"] * 2
    assert {row.reason for row in report.sites} == {
        REAL + "; a scheme of attention.pv alone has no kernel: name attention.qk too"
    }


def test_few_rows_of_queries_stay_float() -> None:
    q, k, v = torch.randn(1, 4, 1, 64), torch.randn(1, 4, 600, 64), torch.randn(1, 4, 600, 64)
    report = check(scaled_dot_product_attention, q, k, v, codegen="ops", attention="qk8")
    reason = REAL + "; with at most 4 rows of queries, coding the keys costs more than it saves"
    assert [(row.kernel, row.reason) for row in report.sites] == [("attention", reason)] * 2


def test_wrong_names_are_refused_with_the_right_ones() -> None:
    with pytest.raises(
        ConfigError, match="unknown attention 'qk7'; use one of auto, off, calibrated, qk8, qk6, qk8-pv8, qk6-pv8"
    ):
        fxquant.FxQuantConfig(attention="qk7")
    with pytest.raises(ConfigError, match="did you mean 'qk8-pv8'"):
        fxquant.FxQuantConfig(sites={"*": "qk8_pv8"})
    with pytest.raises(ConfigError, match="for attention qk8, qk6, qk8-pv8, qk6-pv8"):
        fxquant.FxQuantConfig(sites={"*": "zzz"})
    with pytest.raises(ConfigError, match="unknown scheme 'qk6'"):
        fxquant.FxQuantConfig(scheme="qk6")


def test_auto_never_quantizes() -> None:
    assert schemes(check(scaled_dot_product_attention, *qkv(), codegen="ops")) == [None, None]


def test_dynamic_sizes_and_masks_share_one_graph_of_codes() -> None:
    options: dict[str, Any] = {"codegen": "ops", "attention": "qk8"}
    function = lambda q, mask: scaled_dot_product_attention(q, q, q, attn_mask=mask)  # noqa: E731
    compiled = torch.compile(function, backend="fxquant", dynamic=True, options=options)
    with torch.no_grad():
        for n in (5, 40, 200):
            q, mask = torch.randn(2, 3, n, 16), torch.rand(n, n) > 0.3
            assert torch.equal(compiled(q, mask), torch.ops.fxquant.attention_int(q, q, q, mask, False, None, 8, 0))
    assert kernels(fxquant.report(compiled)) == ["attention_int"] * 2


@torch.no_grad()
def test_multihead_attention_on_codes() -> None:
    layer, x = nn.MultiheadAttention(64, 4, batch_first=True).eval(), torch.randn(2, 65, 64)
    function = lambda x: layer(x, x, x, need_weights=False)[0]  # noqa: E731
    for scheme in SCHEMES:
        got, report = quantized(function, x, attention=scheme, scheme="float", codegen="ops")
        assert kernels(report) == ["attention_int"] * 2
        assert float(torch.cosine_similarity(got.flatten(), function(x).flatten(), dim=0)) > 0.999


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention(need_weights: bool) -> None:
    layer = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    report = check(lambda x: layer(x, x, x, need_weights=need_weights)[0], torch.randn(2, 65, 32), scheme="float")
    assert kernels(report) == ["attention"] * 2  # nobody reads the weights


def test_generation_with_a_static_cache_gives_the_tokens_of_eager() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=512, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 99, (1, 190))
    wanted_args: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        wanted = model.generate(ids, cache_implementation="dynamic", **wanted_args)
        model.forward = torch.compile(model.forward, backend="fxquant", options={"scheme": "float", "codegen": "ops"})
        got = model.generate(ids, cache_implementation="static", disable_compile=True, **wanted_args)
        report = fxquant.report(model.forward)
    assert torch.equal(got, wanted)
    taken = [row for row in report.sites if row.kernel == "attention"]
    assert taken
    assert len(taken) == sum(row.kind.startswith("attention") for row in report.sites)
