"""scaled_dot_product_attention(q, k, v, mask)  →  fxquant::attention_log(q, k, v, mask, qparams ...)

The specification of a calibration (``passes.quantize.attention``) whose weights have logarithmic codes: they are made straight
from the scores, and the products are exact integer sums. A weight next to a threshold may have the neighbouring code.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from fxquant.calibration.attention import AttentionCalibration
from fxquant.calibration.site import StaticCoding
from fxquant.formats import AdaLog, Log2, LogSqrt2, Uniform
from fxquant.formats.log_codes import LogFormat
from fxquant.granularity import PerChannel, PerTensor
from fxquant.reference import log_attention as reference

FAMILIES: dict[type[LogFormat], int] = {Log2: reference.LOG2, LogSqrt2: reference.LOG_SQRT2, AdaLog: reference.ADALOG}
HEADS = PerChannel(1)
CODES = "a kernel needs log2, log√2 or AdaLog codes of the weights, with an exact zero"


def conditions(args: Mapping[str, Any], known: AttentionCalibration) -> Iterator[tuple[str, bool]]:
    """(sentence, whether it holds) for the operands of an attention node by name; the first false one is what the report says.

    The qparams fit the operands: ``passes.quantize.attention.conditions`` comes first.
    """
    dims = args["q"].meta["val"].dim()
    p, v, pair = known.p, known.v, [one for one in (known.q, known.k) if one is not None]
    form = p.coding.format if p is not None else None
    yield (
        CODES,
        isinstance(form, LogFormat) and type(form) in FAMILIES and form.zero_code is not None and not _is_shifted(form),
    )
    yield "a kernel needs uniform codes of v", v is not None and isinstance(v.coding.format, Uniform)
    yield (
        "a kernel needs uniform codes of both q and k, or of neither",
        len(pair) in (0, 2) and all(isinstance(one.coding.format, Uniform) for one in pair),
    )
    by_head = [one for one in (*pair, p) if one is not None]
    yield "a kernel needs qparams of q, k and the weights per tensor or per head", all(_by_head(one, dims) for one in by_head)
    yield (
        "a kernel needs qparams of v per tensor, per head or per channel",
        v is not None and (_by_head(v, dims) or _by_channel(v, dims)),
    )


def sentence(args: Mapping[str, Any], known: AttentionCalibration) -> str:
    """What the kernel does, for the report."""
    p, v, keys = known.p, known.v, args["k"].meta["val"].shape[-2]
    assert p is not None
    assert v is not None
    scores = "exact scores of codes" if known.q is not None else "float scores"
    if not isinstance(keys, int):
        return f"codes of the weights straight from {scores}; their products with codes of v by exact shifts and adds"
    found = reference.planes_of(codes_of(p), keys, reference.largest_code(_top(v), v.qparams.get("zero_point")))
    count = f"in {found.weights.shape[1]} sums" if found.weights.shape[1] > 1 else "in one sum"
    how = f"by exact shifts and adds, {count}" if found.is_exact else f"by shifts and adds {count}, rounded to float32"
    return f"codes of the weights straight from {scores}; their products with codes of v {how}"


def arguments(dims: int, known: AttentionCalibration, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What the operator on q of some dimensions takes after the scale: qparams, ``inputs`` by ``operand_name``, and formats."""
    p, v = known.p, known.v
    assert p is not None
    assert v is not None
    form = p.coding.format
    assert isinstance(form, LogFormat)
    assert form.zero_code is not None
    qparams = [inputs.get(f"{name}_{key}") for name in "qkv" for key in ("scale", "zero_point")]
    weights = inputs["p_scale"], inputs.get("p_base")
    tops = [_top(one) if one is not None else 0 for one in (known.q, known.k, v)]
    return *qparams, *weights, *tops, not _by_head(v, dims), FAMILIES[type(form)], form.width, form.zero_code


def shares_heads(known: AttentionCalibration) -> bool:
    """Whether the qparams of k and v do not depend on how often their heads are repeated."""
    return not any(one is not None and one.coding.granularity in (HEADS, PerChannel(-3)) for one in (known.k, known.v))


def codes_of(p: StaticCoding) -> reference.LogCodes:
    """The format of the weights as the reference has it."""
    form = p.coding.format
    assert isinstance(form, LogFormat)
    assert form.zero_code is not None
    return reference.LogCodes(FAMILIES[type(form)], form.width, form.zero_code, p.qparams["scale"], p.qparams.get("base"))


def _top(one: StaticCoding) -> int:
    form = one.coding.format
    assert isinstance(form, Uniform)
    return form.qmax


def _by_head(one: StaticCoding, dims: int) -> bool:
    granularity = one.coding.granularity
    return isinstance(granularity, PerTensor) or (dims == 4 and granularity in (HEADS, PerChannel(-3)))


def _by_channel(one: StaticCoding, dims: int) -> bool:
    return one.coding.granularity in (PerChannel(-1), PerChannel(dims - 1))


def _is_shifted(form: LogFormat) -> bool:
    return isinstance(form, AdaLog) and form.shift != 0
