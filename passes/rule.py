"""A rule: one rewrite as data. Pattern, precondition, rewrite, and the facts by which the shared test judges it.

The first line of a rule's module docstring is its equation; reports print it. Several spellings of one pattern share the
parameter names; a spelling may leave an optional operand out, which then binds None. Without a rewrite the rule only
names what it sees: every match is refused with the sentence of its precondition.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxquant.passes.match import Match

BITWISE = "BITWISE"  # same bits
REAL = "REAL"  # equal over the reals; rounding may differ
QUANTIZED = "QUANTIZED"  # goes to a number format


@dataclass(frozen=True)
class Proof:
    """Why both sides of a rule agree: ``algebra`` is run on sympy symbols, a ``lemma`` gives the reason in words."""

    kind: str
    reason: str = ""


ALGEBRA = Proof("algebra")


def lemma(reason: str) -> Proof:
    """A proof in words, for what algebra cannot see."""
    return Proof("lemma", reason)


@dataclass(frozen=True)
class Samples:
    """Operands for the shared test: numbers for scalar operands, and the magnitudes that tensors are drawn at."""

    values: Mapping[str, Any] = field(default_factory=dict)
    scale: tuple[float, float] = (1e-2, 10.0)


@dataclass(frozen=True, eq=False)
class Rule:
    """One rewrite.

    ``shapes`` names the sizes of tensor operands (``x="b n"``), ``frozen`` the operands that must be weights,
    ``near_misses`` gives for each sentence of the precondition the operands that break exactly that one.
    """

    pattern: Callable[..., Any]
    precondition: Callable[["Match"], Iterator[tuple[str, bool]]]
    rewrite: Callable[..., Any] | None
    shapes: Mapping[str, str]
    error_class: str
    proof: Proof | None
    near_misses: Mapping[str, Mapping[str, Any]]
    spellings: tuple[Callable[..., Any], ...] = ()
    samples: Samples = Samples()
    frozen: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.pattern.__module__.rpartition(".")[2]

    @property
    def title(self) -> str:
        doc = sys.modules[self.pattern.__module__].__doc__ or ""
        return doc.strip().splitlines()[0] if doc.strip() else self.name

    @property
    def all_spellings(self) -> tuple[Callable[..., Any], ...]:
        return (self.pattern, *self.spellings)


@dataclass(frozen=True)
class Fired:
    """A rule rewrote the value of ``node_name``."""

    rule: Rule
    node_name: str


@dataclass(frozen=True)
class Refused:
    """A rule matched at ``node_name`` but left it, for the reason in ``sentence``."""

    rule: Rule
    node_name: str
    sentence: str


Event = Fired | Refused
