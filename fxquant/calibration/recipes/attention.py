"""The codings of one attention by a published method, from samples of q, k and v.

| method | q, k, v | p |
|---|---|---|
| minmax | affine, per tensor, extent | affine, extent |
| fq-vit | affine, per tensor, percentile | log2, δ = 1 |
| repq, repquant | affine, per tensor, MSE-selected percentile | log√2, δ by the same |
| i&s | affine, per tensor, MSE-selected percentile | SULQ, η by MSE |
| dopq | affine, per tensor, MSE-selected percentile | TanQ, θ by the error of p v |
| ptq4vit | symmetric, per head, grid by the errors of q kᵀ and p v | twin uniform, split by the error of p v |
| adalog | affine, per head, FPCS by the errors of q kᵀ and p v | AdaLog, per head, base by the error of p v |

vit-quantizers sections 3 to 9 and 14. p is that of float q and k. Three differences to what is published: the samples have no
gradients, so ptq4vit's errors are not weighted; heads that share a key head share their qparams; fq-vit's integer softmax is
not part of a coding. Unconfirmed: TanQ's formula, and that AdaLog's base is one a head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fxquant.calibration.attention import AttentionCalibration
from fxquant.calibration.observers import Samples
from fxquant.calibration.recipes.base import Recipe
from fxquant.calibration.searches import (
    Choice,
    Product,
    TensorMetric,
    adalog_base,
    alternate,
    fpcs,
    half_step_start,
    min_max,
    mse_percentile,
    percentile,
    scale_grid,
    scan_qparam,
    sulq_shift,
    twin_split,
)
from fxquant.calibration.searches.fpcs import weight_zero_points
from fxquant.calibration.searches.metric import Metric
from fxquant.calibration.site import StaticCoding
from fxquant.coding import Coding
from fxquant.config import FxQuantConfig
from fxquant.errors import CalibrationError
from fxquant.formats import AdaLog, Format, Log2, LogSqrt2, Sulq, TanQ, TwinSoftmax, Uniform
from fxquant.formats.tanq import ANGLES
from fxquant.granularity import Granularity, PerChannel, PerTensor
from fxquant.lowering.isa import current_isa
from fxquant.passes.quantize.attention import probabilities, repeat_heads
from fxquant.plan import resolve_scheme
from fxquant.schemes import CALIBRATED, Scheme

WHOLE, HEADS = PerTensor(), PerChannel(1)
Search = Callable[[Samples, Format], Choice]


@dataclass(frozen=True, eq=False)
class SeenAttention:
    """Samples of one attention: q [S, H, T, d], k [S, Hk, M, d], v [S, Hk, M, dv], float32, and how its softmax is made.

    ``mask``: bool (True takes part) or float32, of a shape that broadcasts to [S, H, T, M].
    """

    site: str
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    is_causal: bool = False
    scale: float | None = None

    def __post_init__(self) -> None:
        shapes = ", ".join(str(tuple(x.shape)) for x in (self.q, self.k, self.v))
        if any(x.dim() != 4 for x in (self.q, self.k, self.v)):
            raise CalibrationError(f"{self.site}: q, k and v have four axes [samples, heads, rows, width], not {shapes}")
        if self.k.shape[1] != self.v.shape[1] or self.q.shape[1] % self.k.shape[1]:
            raise CalibrationError(f"{self.site}: the heads of q must be a multiple of those of k and v: {shapes}")

    @property
    def sharing(self) -> int:
        """How many query heads read one key head."""
        return self.q.shape[1] // self.k.shape[1]

    @cached_property
    def p(self) -> Tensor:
        """The probabilities [S, H, T, M]."""
        keys = repeat_heads(self.k, self.q)
        return probabilities(self.q, keys, mask=self.mask, is_causal=self.is_causal, scale=self.scale)

    def folded(self, operand: str) -> Tensor:
        """An operand [S, Hk, rows, width]: query heads that share a key head are more rows of one."""
        x: Tensor = getattr(self, operand)
        return x.reshape(x.shape[0], self.k.shape[1], -1, x.shape[-1])

    def samples(self, operand: str, granularity: Granularity) -> Samples:
        """What a search reads."""
        return Samples.of(f"{self.site}: {operand}", self.folded(operand), granularity)

    def product(self, left: str, right: str, left_granularity: Granularity, right_granularity: Granularity) -> Product:
        """q kᵀ or p v."""
        other = self.folded(right)
        other = other.transpose(-2, -1) if right == "k" else other
        return Product(self.site, self.folded(left), other, left_granularity, right_granularity)

    def static(self, operand: str, choice: Choice, granularity: Granularity) -> StaticCoding:
        """A choice as a coding of the operand as the graph has it, with a block for each of its heads."""
        is_shared = granularity == HEADS and operand in "qp"
        repeats = self.sharing if is_shared else 1
        qparams = {name: value.repeat_interleave(repeats, 0) for name, value in choice.qparams.items()}
        return StaticCoding(Coding(choice.format, granularity), qparams)


def attention_bits(recipe: Recipe, config: FxQuantConfig) -> int | None:
    """The bits of operands of attention, those of the activations of linears; None: attention is not coded.

    It is by methods that it is a part of, and where the option ``attention`` is "calibrated".

    Raises:
        CalibrationError: the option asks for it, and the method has no codings of attention.
    """
    scheme = resolve_scheme(config.scheme, current_isa())
    asked = config.attention == CALIBRATED
    if asked and recipe.name not in METHODS:
        raise CalibrationError(
            f"method {recipe.name!r} has no codings of attention; leave the option attention={CALIBRATED!r} out, or use one of "
            f"{', '.join(METHODS)}"
        )
    if not asked and not (config.attention == "auto" and recipe.codes_attention):
        return None
    return scheme.act_bits if isinstance(scheme, Scheme) and not scheme.is_weight_only else None


def choose_attention(seen: SeenAttention, method: str, bits: int) -> AttentionCalibration:
    """Codings of all four operands with ``bits`` each (logarithms of p have one code more, an exact zero).

    Raises:
        CalibrationError: the method is unknown, or the samples are not finite.
    """
    if method not in METHODS:
        raise CalibrationError(f"{seen.site}: unknown method {method!r} for attention; known: {', '.join(METHODS)}")
    with torch.no_grad():
        return METHODS[method](seen, bits)


def _minmax(seen: SeenAttention, bits: int) -> AttentionCalibration:
    return _by_tensor(seen, bits, min_max, min_max(seen.samples("p", WHOLE), Uniform(bits)))


def _fq_vit(seen: SeenAttention, bits: int) -> AttentionCalibration:
    return _by_tensor(
        seen, bits, percentile, min_max(seen.samples("p", WHOLE), Log2(min(bits, 7)))
    )  # smaller values than 2^-126 have no codes


def _repq_vit(seen: SeenAttention, bits: int) -> AttentionCalibration:
    return _by_tensor(seen, bits, mse_percentile, mse_percentile(seen.samples("p", WHOLE), LogSqrt2(bits)))


def _ias_vit(seen: SeenAttention, bits: int) -> AttentionCalibration:
    return _by_tensor(seen, bits, mse_percentile, sulq_shift(seen.samples("p", WHOLE), Sulq(bits)))


def _dopq_vit(seen: SeenAttention, bits: int) -> AttentionCalibration:
    form, samples = TanQ(bits), seen.samples("p", WHOLE)
    metric = seen.product("p", "v", WHOLE, WHOLE).metric("left")
    p = scan_qparam(metric, form, form.fit(samples.values), "angle", ANGLES)
    return _by_tensor(seen, bits, mse_percentile, p)


def _by_tensor(seen: SeenAttention, bits: int, search: Search, p: Choice) -> AttentionCalibration:
    """Affine q, k and v, one block each, with an own coding of p."""
    choices = {name: search(seen.samples(name, WHOLE), Uniform(bits)) for name in "qkv"} | {"p": p}
    return AttentionCalibration(**{name: seen.static(name, choice, WHOLE) for name, choice in choices.items()})


def _ptq4vit(seen: SeenAttention, bits: int) -> AttentionCalibration:
    form, twin = Uniform(bits, is_symmetric=True), TwinSoftmax(bits)
    samples = {name: seen.samples(name, HEADS) for name in "qkv"}
    first = {name: min_max(own, form) for name, own in samples.items()}

    def grid(name: str) -> Callable[[Metric], Choice]:
        return lambda metric: scale_grid(metric, form, half_step_start(samples[name], form))

    q, k = alternate(seen.product("q", "k", HEADS, HEADS), (first["q"], first["k"]), grid("q"), grid("k"))
    start = min_max(seen.samples("p", WHOLE), twin), first["v"]
    p, v = alternate(seen.product("p", "v", WHOLE, HEADS), start, lambda metric: twin_split(metric, twin, 1), grid("v"))
    static = {name: seen.static(name, choice, HEADS) for name, choice in {"q": q, "k": k, "v": v}.items()}
    return AttentionCalibration(p=seen.static("p", p, WHOLE), **static)


def _adalog(seen: SeenAttention, bits: int) -> AttentionCalibration:
    form, logs = Uniform(bits), AdaLog(bits)
    samples = {name: seen.samples(name, HEADS) for name in "qkv"}
    count = weight_zero_points(form)
    first = {name: fpcs(TensorMetric(own), own, form, zero_points=count) for name, own in samples.items()}
    one = torch.ones(seen.k.shape[1], 1)

    def search(name: str) -> Callable[[Metric], Choice]:
        return lambda metric: fpcs(metric, samples[name], form, zero_points=count)

    q, k = alternate(seen.product("q", "k", HEADS, HEADS), (first["q"], first["k"]), search("q"), search("k"))
    start = min_max(seen.samples("p", HEADS), logs), first["v"]
    p, v = alternate(seen.product("p", "v", HEADS, HEADS), start, lambda metric: adalog_base(metric, logs, one), search("v"))
    choices = {"q": q, "k": k, "p": p, "v": v}
    return AttentionCalibration(**{name: seen.static(name, choice, HEADS) for name, choice in choices.items()})


METHODS: dict[str, Callable[[SeenAttention, int], AttentionCalibration]] = {
    "minmax": _minmax,
    "fq-vit": _fq_vit,
    "repq": _repq_vit,
    "repquant": _repq_vit,
    "i&s": _ias_vit,
    "dopq": _dopq_vit,
    "ptq4vit": _ptq4vit,
    "adalog": _adalog,
}
