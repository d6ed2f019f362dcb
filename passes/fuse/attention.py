"""scaled_dot_product_attention(q, k, v, mask)  →  fxquant::attention(q, k, v, mask)

One kernel with no N x M buffer and float accuracy; with a scheme that the options name, fxquant::attention_int on codes.
Keys and values that were repeated for groups of query heads are read where they are: the copy goes.
"""

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx

from fxquant._compat import FakeTensorMode
from fxquant.binding import add_input
from fxquant.calibration.attention import OPERANDS, AttentionCalibration
from fxquant.config import FxQuantConfig
from fxquant.passes.fuse import log_attention
from fxquant.passes.fuse.fusion import Fusion, Verdict
from fxquant.passes.quantize import attention as specification
from fxquant.schemes import ATTENTION_SCHEMES, CALIBRATED, AttentionScheme

aten = torch.ops.aten
MAX_DEPTH = 256  # the largest head size that was measured
# Below so many products of q and k, calling the kernel costs more than it saves (measured on AVX2, two threads: even at
# 12 heads of 1 x 128 x 64, 1.3 to 1.5 times faster at 12 heads of 16 x 16 x 32).
MIN_PRODUCTS = 98304
# Up to so many rows of queries (decoding), coding the keys costs more than their exact product.
FEW_ROWS = 4
NO_KERNEL = "no integer kernel has this coding: its specification runs in float"
_NAMES = ("q", "k", "v", "mask", "dropout_p", "is_causal")
_RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
_SAME = (aten.clone.default, aten.contiguous.default, aten.alias.default, aten.slice.Tensor)


def operands(node: fx.Node) -> dict[str, Any]:
    """The arguments of a scaled_dot_product_attention node by name, defaults filled in."""
    given = dict(zip(_NAMES, node.args, strict=False)) | dict(node.kwargs)
    given["mask"] = given.pop("attn_mask", given.get("mask"))
    return {"dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False} | given


def conditions(node: fx.Node) -> Iterator[tuple[str, bool]]:
    """(sentence, whether it holds); the first false one is what the report says."""
    args = operands(node)
    q, k, v = (args[name].meta["val"] for name in "qkv")
    mask = args["mask"].meta["val"] if args["mask"] is not None else None
    yield "attention with dropout keeps the operator of PyTorch", args["dropout_p"] == 0
    yield "only CPU has an attention kernel yet", q.device.type == "cpu"
    yield "q, k and v must be float32 for the attention kernel", all(x.dtype == torch.float32 for x in (q, k, v))
    yield "q, k and v must have 3 or 4 dimensions", q.dim() in (3, 4) and k.dim() == v.dim() == q.dim()
    yield "q, k and v must share their batch size", len({str(x.shape[0]) for x in (q, k, v)}) == 1
    yield "the heads of q must be a known multiple of those of k and v", _heads_fit(q, k, v, bool(args["enable_gqa"]))
    yield (
        f"head sizes must lie between 1 and {MAX_DEPTH}, where the kernel was measured",
        all(not isinstance(x.shape[-1], int) or 0 < x.shape[-1] <= MAX_DEPTH for x in (q, v)),
    )
    yield "there must be keys and queries", not any(isinstance(s, int) and s == 0 for x in (q, k) for s in x.shape)
    yield "a mask beside is_causal keeps the operator of PyTorch", mask is None or not args["is_causal"]
    yield (
        "the mask must be bool or float32 and have 2 dimensions up to those of q",
        mask is None or (mask.dtype in (torch.bool, torch.float32) and 2 <= mask.dim() <= q.dim()),
    )
    yield "the scale must be a number", args["scale"] is None or isinstance(args["scale"], (int, float))


def is_small(node: fx.Node) -> bool:
    """Whether the operator of PyTorch is as fast."""
    args = operands(node)
    q, k = args["q"].meta["val"], args["k"].meta["val"]
    return all(isinstance(s, int) for s in (*q.shape, k.shape[-2])) and q.numel() * k.shape[-2] < MIN_PRODUCTS


def has_few_rows(node: fx.Node) -> bool:
    """Whether the queries are known to be at most FEW_ROWS."""
    q = operands(node)["q"].meta["val"]
    return isinstance(q.shape[-2], int) and q.shape[-2] <= FEW_ROWS


def _heads_fit(q: Tensor, k: Tensor, v: Tensor, grouped: bool) -> bool:
    if q.dim() == 3:
        return True
    heads, key_heads, value_heads = (x.shape[1] for x in (q, k, v))
    if not grouped:
        return str(heads) == str(key_heads) == str(value_heads)
    known = all(isinstance(size, int) and size > 0 for size in (heads, key_heads, value_heads))
    return known and key_heads == value_heads and heads % key_heads == 0


def decide(node: fx.Node, settings: Mapping[str, str], config: FxQuantConfig, isa: str) -> Verdict:
    """Whether a kernel takes an attention node, which, and why."""
    if settings.get("attention.qk") == "off":
        return Verdict("the option attention='off' keeps the operator of PyTorch")
    for sentence, holds in conditions(node):
        if not holds:
            return Verdict(sentence)
    scheme = resolve(settings, node)
    if isinstance(scheme, AttentionScheme):
        return Verdict(_quantized(scheme), kernel="attention_int", error_class="QUANTIZED", schemes=scheme.names)
    if is_small(node):
        return Verdict(f"fewer than {MIN_PRODUCTS} products of q and k: the operator of PyTorch is as fast{scheme}")
    return Verdict(f"float attention with no N x M buffer{scheme}", kernel="attention", error_class="REAL")


def decide_calibrated(node: fx.Node, settings: Mapping[str, str], known: AttentionCalibration) -> Verdict | None:
    """The verdict by a calibration's codings; None where the options name a scheme, turn attention off or ask for float."""
    named = {kind: settings.get(kind, "auto") for kind in OPERANDS}
    if any(setting == "off" or setting in ATTENTION_SCHEMES for setting in named.values()):
        return None
    known = known.without(kind for kind, setting in named.items() if setting == "float")
    if not known.codings:
        return None
    for sentence, holds in chain(conditions(node), specification.conditions(operands(node), known)):
        if not holds:
            return Verdict(sentence)
    for sentence, holds in log_attention.conditions(operands(node), known):
        if not holds:
            return Verdict(f"{NO_KERNEL}; {sentence}", error_class="QUANTIZED", schemes=known.schemes, calibrated=known)
    reason = log_attention.sentence(operands(node), known)
    return Verdict(reason, "attention_log", "QUANTIZED", known.schemes, known)


def resolve(settings: Mapping[str, str], node: fx.Node) -> AttentionScheme | str:
    """The scheme that the settings of both sites make, or why there is none (empty where none was asked for)."""
    qk, pv = (ATTENTION_SCHEMES.get(settings.get(kind, "auto")) for kind in ("attention.qk", "attention.pv"))
    if qk is None and CALIBRATED in settings.values():
        return "; no calibration has codings of it"
    if qk is None:
        return "" if pv is None or not pv.pv_bits else "; a scheme of attention.pv alone has no kernel: name attention.qk too"
    if has_few_rows(node):
        return f"; with at most {FEW_ROWS} rows of queries, coding the keys costs more than it saves"
    return AttentionScheme(qk.qk_bits, qk.pv_bits if pv is not None and pv.pv_bits else 0)


def _quantized(scheme: AttentionScheme) -> str:
    product = f"exact integer sums of {scheme.qk_bits}-bit q and centred k"
    return f"{product}, and of {scheme.pv_bits}-bit weights and v" if scheme.pv_bits else f"{product}; softmax and v in float"


def fuse(node: fx.Node, verdict: Verdict, fake_mode: FakeTensorMode) -> fx.Node:
    """Replace the node by one of our operators, or with a calibration's codings that no kernel has by its specification.

    The result is contiguous where the old one was, unless every reader swaps heads and queries first: those then read
    contiguous memory without a copy.
    """
    args = operands(node)
    known = verdict.calibrated
    if known is not None and verdict.kernel is None:
        return specification.quantize_attention(node, args, known, fake_mode)
    k, v = args["k"], args["v"]
    sources = unrepeated(k), unrepeated(v)
    shares = known is None or log_attention.shares_heads(known)
    if shares and sources[0] is not None and sources[1] is not None and _key_heads(sources[0]) == _key_heads(sources[1]):
        k, v = sources
    call: tuple[Any, ...] = (args["q"], k, v, args["mask"], bool(args["is_causal"]), args["scale"])
    if known is not None:
        made = _log_attention(node, call, args, known, fake_mode)
    elif verdict.schemes:
        made = _call(node, torch.ops.fxquant.attention_int.default, call + _bits(verdict), fake_mode)
    else:
        made = _call(node, torch.ops.fxquant.attention.default, call, fake_mode)
    old: Tensor = node.meta["val"]
    if _layout(made.meta["val"]) != _layout(old) and not all(map(_swaps_heads, node.users)):
        made = _call(node, aten.clone.default, (made,), fake_mode, memory_format=torch.contiguous_format)
    node.replace_all_uses_with(made)
    graph = node.graph
    graph.erase_node(node)
    return made


def _log_attention(
    node: fx.Node, call: tuple[Any, ...], args: Mapping[str, Any], known: AttentionCalibration, fake_mode: FakeTensorMode
) -> fx.Node:
    """fxquant::attention_log; the qparams become graph inputs, in the order of ``known.tensors()``."""
    inputs = {name: add_input(node.graph, f"{node.name}_{name}", value, fake_mode) for name, value in known.tensors().items()}
    try:
        given = call + log_attention.arguments(len(call[0].meta["val"].shape), known, inputs)
        return _call(node, torch.ops.fxquant.attention_log.default, given, fake_mode)
    except Exception:
        for added in inputs.values():  # nothing reads them, and nobody would feed them
            node.graph.erase_node(added)
        raise


def _bits(verdict: Verdict) -> tuple[int, ...]:
    """qk_bits and pv_bits."""
    names = (verdict.schemes.get(kind) for kind in ("attention.qk", "attention.pv"))
    return tuple(int(name[2:]) if name else 0 for name in names)


def _swaps_heads(user: fx.Node) -> bool:
    if user.target is aten.transpose.int:
        return tuple(user.args[1:]) in ((1, 2), (2, 1), (-3, -2), (-2, -3))
    return user.target is aten.permute.default and user.args[1] == [0, 2, 1, 3]


def unrepeated(node: fx.Node) -> fx.Node | None:
    """The keys or values [B, Hkv, M, d] before they were repeated along the heads, or None."""
    if node.target is aten.repeat_interleave.self_int:
        source, _, *dim = node.args
        whole = dim == [1] and isinstance(source, fx.Node) and source.meta["val"].dim() == 4
        return source if whole and isinstance(source, fx.Node) else None
    if node.target not in _RESHAPES:
        return None
    expand = _skip_copies(node.args[0])
    if expand.target is not aten.expand.default:
        return None
    unsqueeze = _skip_copies(expand.args[0])
    if unsqueeze.target is not aten.unsqueeze.default or unsqueeze.args[1] != 2:
        return None
    source = _skip_copies(unsqueeze.args[0])
    before, wide, after = (tuple(map(str, x.meta["val"].shape)) for x in (source, expand, node))
    fits = len(before) == 4 and len(after) == 4 and (wide[:2], wide[3:]) == (before[:2], before[2:])
    same = fits and (after[0], after[2:]) == (before[0], before[2:])
    return source if same else None


def _skip_copies(node: Any) -> fx.Node:
    while node.target in _SAME and tuple(map(str, node.meta["val"].shape)) == tuple(map(str, node.args[0].meta["val"].shape)):
        node = node.args[0]
    assert isinstance(node, fx.Node)
    return node


def _key_heads(node: fx.Node) -> str:
    return str(node.meta["val"].shape[1])


def _layout(x: Tensor) -> tuple[str, ...]:
    return tuple(map(str, x.stride()))  # as text: comparing symbolic strides would add guards


def _call(like: fx.Node, target: Any, args: tuple[Any, ...], fake_mode: FakeTensorMode, **named: Any) -> fx.Node:
    with like.graph.inserting_before(like):
        made = like.graph.call_function(target, args, named)
    values = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args]
    with fake_mode, torch.no_grad():
        value = target(*values, **named)
    made.meta = {**like.meta, "val": value}
    return made


FUSION = Fusion(decide, fuse)
