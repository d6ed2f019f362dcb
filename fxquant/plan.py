"""The plan: every candidate site gets a scheme, or a sentence that says why it stays float."""

import difflib
import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from fxquant.config import FxQuantConfig
from fxquant.errors import ConfigError
from fxquant.schemes import Scheme, choose_scheme, parse_scheme
from fxquant.sites import Site

# Why a kind other than linear stays float; the docs print this table.
FLOAT_KINDS = {
    "attention.qk": "attention keeps float accuracy: there is no quantized QKᵀ kernel yet",
    "attention.pv": "attention keeps float accuracy: there is no quantized PV kernel yet",
    "softmax": "softmax keeps float accuracy: there is no quantized softmax kernel yet",
    "layer_norm": "norms keep float accuracy",
    "rms_norm": "norms keep float accuracy",
    "gelu": "GELU keeps float accuracy; next to a quantized linear it is fused into its epilogue",
    "silu": "SiLU keeps float accuracy; next to a quantized linear it is fused into its epilogue",
    "matmul": "a product of two activations, or of a weight that is no matrix: there is no quantized kernel for it yet",
    "embedding": "embedding look-ups are not quantized yet",
    "conv": "convolutions are not quantized yet",
    "recurrent": "recurrent layers are not quantized yet",
    "region": "a region of another operator (control flow, flex attention, checkpoint): its inside is not rewritten",
}


@dataclass(frozen=True)
class Decision:
    """What happens at one site: a scheme, or a reason (one sentence) why it stays float."""

    site: Site
    scheme: Scheme | None = None
    reason: str | None = None

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
                replace(decision, scheme=None, reason=reasons[decision.site.name])
                if decision.site.name in reasons
                else decision
                for decision in self.decisions
            )
        )

    @property
    def taken(self) -> dict[str, Scheme]:
        """Site name → scheme of every site that is quantized."""
        return {d.site.name: d.scheme for d in self.decisions if d.scheme is not None}

    def __str__(self) -> str:
        return "\n".join(f"{d.site.name}: {d.scheme if d.is_taken else f'float, {d.reason}'}" for d in self.decisions)


def setting_for(site: Site, config: FxQuantConfig) -> str:
    """The setting that the options give a site: that of the first matching pattern, else ``scheme``."""
    for pattern, setting in config.sites.items():
        if site_matches(pattern, site):
            return setting
    return config.scheme


def site_matches(pattern: str, site: Site) -> bool:
    """Whether a shell-style pattern names a site: by its name, its module path, a tail of the path, or its weight."""
    names = [site.name, site.path, site.weight or ""]
    return any(fnmatch.fnmatchcase(name, wanted) for name in names if name for wanted in (pattern, f"*.{pattern}"))


def unmatched_patterns(config: FxQuantConfig, sites: tuple[Site, ...]) -> list[str]:
    """The patterns of ``sites`` that name no site of this graph."""
    return [pattern for pattern in config.sites if not any(site_matches(pattern, site) for site in sites)]


def check_patterns(config: FxQuantConfig, sites: tuple[Site, ...]) -> None:
    """Raise ConfigError, with the nearest site names, where a pattern of ``sites`` matches nothing."""
    for pattern in unmatched_patterns(config, sites):
        paths = list(dict.fromkeys(site.path or site.name for site in sites))
        close = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.3) or paths[:3]
        raise ConfigError(f"sites: the pattern {pattern!r} matches no site; nearest: {', '.join(map(repr, close))}")


def resolve_scheme(setting: str, isa: str) -> Scheme | str:
    """The scheme of a setting on an instruction set, or the sentence why it is float."""
    if setting == "float":
        return "the options ask for float"
    if setting != "auto":
        return parse_scheme(setting)
    chosen = choose_scheme(isa)
    return chosen or f"auto: on the instruction set {isa!r} no integer kernel is faster than float"
