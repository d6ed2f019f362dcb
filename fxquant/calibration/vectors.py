"""Vectors for migrations, found from data: rule → site → operand → tensor, for ``calibrate(vectors=...)``.

Each rule has one setting. a is the greatest |x| of an input channel on the data.

| rule | setting | vector |
|---|---|---|
| smooth | α of 0 .. 1 | f = a^α / w^(1-α), w the greatest weight of the channel over all readers of the norm (SmoothQuant) |
| exponent_shift | most, 1 .. 15 | e = -min(rne(log2(a / min a)), most), a power of two (FQ-ViT's factor has most = 3) |
| one_scale | bits, 2 .. 8 | affine scale and whole zero point of each channel, and their means, that of z rounded (RepQ-ViT) |
| value_scale | exponent of 0 .. 1 | f = (a / max a)^exponent of the value channels |
| rotary_scale | α > 0 | f = √(k_j² + k_(j + d/2)²) / α of the keys, greatest over tokens (FireQ) |
| low_rank | pattern → rank, or share below 1 | V, leading directions of the output's covariance, and its mean (LoRD) |

A share is that of the weight's numbers that stay. What a rule refuses, such as a norm that something else reads too, the
report says.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fxquant.calibration.files import Vectors
from fxquant.calibration.migration import lord, smoothquant
from fxquant.calibration.migration.factor import guarded
from fxquant.calibration.migration.power import power
from fxquant.calibration.observers import InputExtents, refuse_not_finite
from fxquant.calibration.recipes.base import OBSERVERS, Gathered
from fxquant.calibration.seen import Seen
from fxquant.calibration.sources import SOURCE, source_of
from fxquant.calibration.study import LinearSite, Study, refuse_no_batches
from fxquant.config import override_options
from fxquant.errors import CalibrationError, ConfigError
from fxquant.formats import Uniform
from fxquant.passes.reparam.exponent_shift import MAX_EXPONENT
from fxquant.plan import site_matches
from fxquant.sites import Site

BySite = dict[str, dict[str, Tensor]]
NORMS = ("layer_norm", "rms_norm")


@dataclass
class _Watched:
    """What was seen: of linears behind norms and those that get a rank, and of the keys and values of attention, by path."""

    study: Study
    ranks: Mapping[str, float]
    linears: dict[str, Gathered] = field(default_factory=dict)
    biases: dict[str, Tensor | None] = field(default_factory=dict)
    keys: dict[str, Tensor] = field(default_factory=dict)  # √(k_j² + k_(j + d/2)²) [Hk, d/2]
    values: dict[str, Tensor] = field(default_factory=dict)  # |v| [Hk, dv]

    def linear(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Computes a linear, and observes its input."""
        site = self.study.sites[name]
        if name not in self.linears:
            site.refuse_not_finite()
            more = {key: OBSERVERS[key](name, 0) for key in ("gram", "moments")} if self.rank(site) else {}
            self.linears[name] = Gathered(site, InputExtents(name), more)
            self.biases[name] = bias
        self.linears[name].observe(x)
        return linear(x, weight, bias)

    def attention(self, path: str, operands: Mapping[str, Any]) -> None:
        """Observes keys and values of one attention, if they have four axes."""
        k, v = (operands[name].detach().to(torch.float32) for name in "kv")
        refuse_not_finite(path, k)
        refuse_not_finite(path, v)
        if k.dim() != 4 or not k.numel():
            return
        k, v = _distinct(k), _distinct(v)
        low, high = k.chunk(2, -1) if k.shape[-1] % 2 == 0 else (k, k)
        _raise_to(self.keys, path, (low.square() + high.square()).amax((0, 2)).sqrt())
        _raise_to(self.values, path, v.abs().amax((0, 2)))

    def rank(self, site: LinearSite) -> int | None:
        """The rank that a pattern gives a linear."""
        for pattern, setting in self.ranks.items():
            if site_matches(pattern, Site(site.name, "linear", "", ())):
                n, k = site.shape
                return int(setting) if setting >= 1 else max(int(setting * lord.break_even(n, k)), 1)
        return None

    def behind_norms(self) -> Iterable[tuple[Tensor, Tensor, list[LinearSite]]]:
        """The extent of a norm's output, low and high [K], with the linears that read it."""
        groups: dict[str, list[LinearSite]] = {}
        for name, gathered in self.linears.items():
            if gathered.site.comes_from in NORMS:
                groups.setdefault(gathered.site.reads, []).append(self.study.sites[name])
        for sites in groups.values():
            seen = self.linears[sites[0].name].extents.statistics()
            if seen is not None:
                yield seen.low, seen.high, sites


def _distinct(x: Tensor) -> Tensor:
    """The heads [B, H, T, d] without the copies that grouped queries read: the rules know those of the linear alone."""
    heads = x.shape[1]
    for copies in (n for n in range(heads, 1, -1) if heads % n == 0):
        groups = x.unflatten(1, (-1, copies))
        if torch.equal(groups, groups[:, :, :1].expand_as(groups)):
            x = groups.select(2, 0)
            break
    return x


def _raise_to(kept: dict[str, Tensor], path: str, found: Tensor) -> None:
    kept[path] = torch.maximum(kept[path], found) if path in kept else found


def find_vectors(model: Callable[..., Any], batches: Iterable[Any], settings: Mapping[str, Any], options: object) -> Vectors:
    """The vectors of the named rules, found on the batches, with the folds of ``options`` done before.

    Raises:
        ConfigError: a rule or its setting is not in the table above.
        CalibrationError: there is no batch, data are not finite, or a pattern of ``low_rank`` names no linear.
    """
    refuse_no_batches(batches)
    for rule, setting in settings.items():
        _check(rule, setting)
    study = Study(model, override_options(options, calibration=None))
    seen = _Watched(study, settings.get("low_rank", {}))
    study.overrides, study.watch_attention = _Every(seen), seen.attention
    count = 0
    with torch.no_grad():
        for batch in batches:
            study(batch)
            count += 1
        if not count:
            raise CalibrationError("there is no batch to find vectors on; a generator that was read before is empty")
        return {rule: RULES[rule](seen, setting) for rule, setting in settings.items()}


class _Every(dict[str, Any]):
    """Computes every linear by ``watched``."""

    def __init__(self, watched: _Watched) -> None:
        super().__init__()
        self._watched = watched

    def get(self, name: str, default: Any = None) -> Any:
        return lambda x, weight, bias: self._watched.linear(name, x, weight, bias)


def _smooth(seen: _Watched, alpha: float) -> BySite:
    found: BySite = {}
    for low, high, sites in seen.behind_norms():
        absmax = Seen(1, absmax=torch.maximum(-low, high))
        factor = smoothquant.factor(absmax, [site.weight for site in sites], alpha).to(sites[0].weight.dtype)
        found |= {site.name: {"factor": factor} for site in sites}
    return found


def _exponent_shift(seen: _Watched, most: int) -> BySite:
    found: BySite = {}
    for low, high, sites in seen.behind_norms():
        absmax = torch.maximum(-low, high)
        smallest = absmax[absmax > 0].amin() if bool((absmax > 0).any()) else absmax.new_tensor(1.0)
        exponent = -torch.log2((absmax / smallest).clamp_min(1.0)).round().clamp_max(most) + 0.0
        found |= {site.name: {"exponent": exponent.to(sites[0].weight.dtype)} for site in sites}
    return found


def _one_scale(seen: _Watched, bits: int) -> BySite:
    found: BySite = {}
    for low, high, sites in seen.behind_norms():
        fitted = Uniform(bits).qparams(low[:, None], high[:, None])
        scale, zero_point = (fitted[name].reshape(-1).to(sites[0].weight.dtype) for name in ("scale", "zero_point"))
        whole = {"tensor_scale": scale.mean()[None], "tensor_zero_point": zero_point.mean().round()[None]}
        operands = {"scale": scale, "zero_point": zero_point, **whole}
        found |= {site.name: operands for site in sites}
    return found


def _value_scale(seen: _Watched, exponent: float) -> BySite:
    found = {path: power(Seen(1, absmax=absmax.reshape(-1)), exponent) for path, absmax in seen.values.items()}
    return {_attention_site(path, "pv"): {"factor": factor} for path, factor in found.items()}


def _rotary_scale(seen: _Watched, alpha: float) -> BySite:
    found = {}
    for path, pair in seen.keys.items():
        scale = guarded(pair / alpha, pair).repeat(1, 2)
        found[_attention_site(path, "qk")] = {"factor": scale.reshape(-1)}
    return found


def _attention_site(path: str, product: str) -> str:
    """The inverse of ``attention_path``."""
    module, mark, number = path.partition("#")
    return f"{module}:attention.{product}{mark}{number}"


def _low_rank(seen: _Watched, ranks: Mapping[str, float]) -> BySite:
    found: BySite = {}
    for name, gathered in seen.linears.items():
        rank, weight = seen.rank(gathered.site), gathered.site.weight
        if rank is None or not gathered.observers:
            continue
        bias = seen.biases[name]
        try:
            factors = lord.factorize(weight, bias, rank, gathered.seen)
        except CalibrationError as error:
            raise CalibrationError(f"{name}: {error}") from None
        mean = weight.to(torch.float64) @ gathered.seen.need("mean", "low_rank")
        mean = mean if bias is None else mean + bias
        operands = {"basis": factors.up.to(weight.dtype), "mean": mean.to(weight.dtype)}
        found[name] = {**operands, SOURCE: source_of(weight)}
    for pattern in ranks:
        if not any(site_matches(pattern, Site(name, "linear", "", ())) for name in found):
            known = ", ".join([*seen.linears][:3])
            raise CalibrationError(f"low_rank: {pattern!r} names no linear that ran on these batches, such as {known}")
    return found


RULES: Mapping[str, Callable[[_Watched, Any], BySite]] = {
    "smooth": _smooth,
    "exponent_shift": _exponent_shift,
    "one_scale": _one_scale,
    "value_scale": _value_scale,
    "rotary_scale": _rotary_scale,
    "low_rank": _low_rank,
}
_EXPECTED: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "smooth": ("α of 0 .. 1", lambda value: 0 <= value <= 1),
    "exponent_shift": (f"the most, 1 .. {MAX_EXPONENT}", lambda value: value in range(1, MAX_EXPONENT + 1)),
    "one_scale": ("bits, 2 .. 8", lambda value: value in range(2, 9)),
    "value_scale": ("an exponent of 0 .. 1", lambda value: 0 <= value <= 1),
    "rotary_scale": ("α > 0", lambda value: 0 < value < float("inf")),
    "low_rank": (
        "a mapping of patterns to ranks (whole, at least 1) or shares below 1",
        lambda value: all(
            isinstance(pattern, str) and (0 < rank < 1 or rank == int(rank) >= 1) for pattern, rank in value.items()
        ),
    ),
}


def _check(rule: str, setting: Any) -> None:
    if rule not in RULES:
        raise ConfigError(f"vectors: no rule is called {rule!r}; known: {', '.join(RULES)}")
    expected, is_right = _EXPECTED[rule]
    try:
        right = is_right(setting)
    except (AttributeError, TypeError, ValueError):
        right = False
    if not right:
        raise ConfigError(f"vectors: {rule} takes {expected}, not {setting!r}")
