"""The plan: every candidate site gets a scheme, or a sentence that says why it stays float."""

import difflib
import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from fxquant.config import FxQuantConfig
from fxquant.errors import ConfigError
from fxquant.reach import reach
from fxquant.schemes import ATTENTION_SCHEMES, LinearScheme, choose_scheme, parse_scheme
from fxquant.sites import Site

aten = torch.ops.aten
# auto codes the input of a gated linear with so many bits: a few of its tokens and channels exceed the others a
# hundredfold in language models (benchmarks/decode.py --part prefill), and 7 bits leave little of the others.
GATED_BITS = 8
GATED = "its input is a product of two activations, which tends to have outliers"
_KEEP_VALUES = (aten.view.default, aten.reshape.default, aten.to.dtype, aten._to_copy.default, aten.clone.default)
# Why a kind stays float that has neither a scheme nor a kernel (passes/fuse); the docs print this table.
FLOAT_KINDS = {
    "layer_norm": "norms keep float accuracy",
    "rms_norm": "norms keep float accuracy",
    "silu": "SiLU keeps float accuracy; next to a quantized linear it is fused into its epilogue",
    "matmul": "a product of two activations, or of a weight that is no matrix: there is no quantized kernel for it yet",
    "embedding": "embedding look-ups are not quantized yet",
    "conv": "convolutions are not quantized yet",
    "recurrent": "recurrent layers are not quantized yet",
    "region": "a region of another operator (control flow, flex attention, checkpoint): its inside is not rewritten",
}


@dataclass(frozen=True)
class Decision:
    """What happens at one site: a scheme, or a reason (one sentence) why it stays float.

    With a scheme, the reason is why it is not static although there is a calibration, or why its activations are wide.
    ``kernel`` is the fxquant:: operator that computes the site (None: the operator that the graph had), ``error_class``
    that of the change. The scheme of a site that is no linear is a name.
    """

    site: Site
    scheme: LinearScheme | str | None = None
    reason: str | None = None
    kernel: str | None = None
    error_class: str | None = None

    @property
    def is_taken(self) -> bool:
        return self.scheme is not None


@dataclass(frozen=True)
class Plan(Mapping[str, Decision]):
    """Immutable mapping of site name → Decision, in graph order."""

    decisions: tuple[Decision, ...] = ()

    def __getitem__(self, name: str) -> Decision:
        for decision in self.decisions:
            if decision.site.name == name:
                return decision
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (decision.site.name for decision in self.decisions)

    def __len__(self) -> int:
        return len(self.decisions)

    def refuse(self, reasons: Mapping[str, str]) -> "Plan":
        """The same plan with the named sites left float for the given reasons."""
        return Plan(
            tuple(
                replace(decision, scheme=None, reason=reasons[decision.site.name], kernel=None, error_class=None)
                if decision.site.name in reasons
                else decision
                for decision in self.decisions
            )
        )

    @property
    def taken(self) -> dict[str, LinearScheme | str]:
        """Site name → scheme of every site that is quantized."""
        return {d.site.name: d.scheme for d in self.decisions if d.scheme is not None}

    def __str__(self) -> str:
        return "\n".join(f"{d.site.name}: {d.scheme if d.is_taken else f'float, {d.reason}'}" for d in self.decisions)


def setting_for(site: Site, config: FxQuantConfig) -> str:
    """The setting that the options give a site: that of the first pattern that matches and means something to its kind,
    else ``scheme`` of a linear, ``attention`` of attention, and auto.
    """
    for pattern, setting in config.sites.items():
        if site_matches(pattern, site) and _concerns(setting, site):
            return setting
    return {"linear": config.scheme, "attention": config.attention}.get(site.kind.partition(".")[0], "auto")


def _concerns(setting: str, site: Site) -> bool:
    """Whether a kind of site knows a setting: attention and linears have schemes of their own."""
    is_attention = site.kind.startswith("attention")
    return setting in ("auto", "float") or is_attention == (setting in ATTENTION_SCHEMES)


def site_matches(pattern: str, site: Site) -> bool:
    """Whether a shell-style pattern names a site: by its name, its module path, a tail of the path, or its weight."""
    names = [site.name, site.path, site.weight or ""]
    return any(fnmatch.fnmatchcase(name, wanted) for name in names if name for wanted in (pattern, f"*.{pattern}"))


def unmatched_patterns(config: FxQuantConfig, sites: tuple[Site, ...]) -> list[str]:
    """The patterns of ``sites`` that name no site of this graph."""
    return [
        pattern
        for pattern, setting in config.sites.items()
        if not any(
            site_matches(pattern, site) and (setting not in ATTENTION_SCHEMES or _concerns(setting, site)) for site in sites
        )
    ]


def names_absent_weight(pattern: str, values: Iterable[object], present: set[int]) -> bool:
    """Whether a pattern names a module, within reach of some values, whose weights a graph does not read.

    Another branch of the function may use it. ``present`` are the identities of the weights that the graph reads.
    """
    op = pattern.rpartition(":")[2] if ":" in pattern else "linear"
    for path, value in reach(values):
        named = [(path, value)] if isinstance(value, Tensor) else _named_weights(path, value)
        for name, weight in named:
            owner = name.rpartition(".")[0]
            if id(weight) not in present and site_matches(pattern, Site(f"{owner}:{op}", "linear", "", (), name)):
                return True
    return False


def _named_weights(path: str, module: nn.Module) -> list[tuple[str, Tensor]]:
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return [(f"{path}.{name}".replace("_orig_mod.", "").strip("."), weight) for name, weight in named]


def refuse_patterns(unmatched: Iterable[str], sites: tuple[Site, ...]) -> None:
    """Raise ConfigError, with the nearest site names, for the first pattern that matched nothing."""
    for pattern in unmatched:
        if any(site_matches(pattern, site) for site in sites):
            raise ConfigError(f"sites: the pattern {pattern!r} matches no attention, and its scheme is for nothing else")
        paths = list(dict.fromkeys(site.path or site.name for site in sites))
        close = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.3) or paths[:3]
        raise ConfigError(f"sites: the pattern {pattern!r} matches no site; nearest: {', '.join(map(repr, close))}")


def resolve_scheme(setting: str, isa: str, x: fx.Node | None = None) -> LinearScheme | str:
    """The scheme of a setting on an instruction set, for a linear that reads ``x``, or the sentence why it is float."""
    if setting == "float":
        return "the options ask for float"
    if setting != "auto":
        return parse_scheme(setting)
    chosen = choose_scheme(isa)
    if chosen is None:
        return f"auto: on the instruction set {isa!r} no integer kernel is faster than float"
    return chosen if x is None or not is_gated(x) else replace(chosen, act_bits=max(chosen.act_bits, GATED_BITS))


def origin(x: fx.Node) -> fx.Node:
    """The node that made a value, before it was reshaped, copied or cast."""
    while x.target in _KEEP_VALUES and isinstance(x.args[0], fx.Node):
        x = x.args[0]
    return x


def is_gated(x: fx.Node) -> bool:
    """Whether a value is the product of two activations of one shape, as SwiGLU's is: the input of down_proj."""
    x = origin(x)
    if x.target in (aten.glu.default, aten.mul.Tensor):
        factors = x.all_input_nodes
        shapes = [factor.meta["val"].shape for factor in factors if isinstance(factor.meta.get("val"), Tensor)]
        frozen = any(factor.meta.get("fxquant_frozen", False) for factor in factors)
        return x.target == aten.glu.default or (not frozen and len(shapes) == 2 and shapes[0] == shapes[1])
    return False
