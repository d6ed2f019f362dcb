"""A rule: one rewrite as data. Pattern, precondition, rewrite, and the facts by which the shared test judges it.

The first line of a rule's module docstring is its equation; reports print it. Several spellings of one pattern share the
parameter names; a spelling may leave an optional operand out, which then binds None. Without a rewrite the rule only
names what it sees: every match is refused with the sentence of its precondition.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxquant.passes.match import Match

BITWISE = "BITWISE"  # same bits
REAL = "REAL"  # equal over the reals; rounding may differ
QUANTIZED = "QUANTIZED"  # goes to a number format
BOUNDED = "BOUNDED"  # an approximation with a proved largest error; off by default


@dataclass(frozen=True)
class Proof:
    """Why both sides of a rule agree: ``algebra`` is run on sympy symbols, a ``lemma`` gives the reason in words.

    A ``bound`` says how far they may differ: ``holds(left, right, operands)`` checks it on drawn operands.
    """

    kind: str
    reason: str = ""
    holds: Callable[[Any, Any, Mapping[str, Any]], bool] | None = None


ALGEBRA = Proof("algebra")


def lemma(reason: str) -> Proof:
    """A proof in words, for what algebra cannot see."""
    return Proof("lemma", reason)


def bound(reason: str, holds: Callable[[Any, Any, Mapping[str, Any]], bool]) -> Proof:
    """A proof that both sides of an approximation differ no more than it says."""
    return Proof("bound", reason, holds)


class Sizes(str):
    """A list of sizes as an operand, by their names: ``Sizes("b n h d")``; ``h*d`` is a product."""


def size_of(name: str, sizes: Mapping[str, int]) -> int:
    """The size that a name of a shape stands for; ``h*d`` is a product."""
    return math.prod(sizes[part] for part in name.split("*"))


@dataclass(frozen=True)
class Samples:
    """Operands for the shared test: numbers for scalar operands, and the magnitudes that tensors are drawn at.

    A word says how a tensor is drawn: ``finite`` and ``boolean`` masks, ``positive``, ``integer``,
    ``pairs`` (positive, the same in both halves of every four), ``orthonormal`` columns.
    A function makes a value from the sizes.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    scale: tuple[float, float] = (1e-2, 10.0)


@dataclass(frozen=True, eq=False)
class Rule:
    """One rewrite.

    ``shapes`` names the sizes of tensor operands (``x="b n"``), ``frozen`` the operands that must be weights,
    ``near_misses`` gives for each sentence of the precondition the operands that break exactly that one.

    The rewrite of a rule that ``reweights`` returns new values for some operands, by name: the matched operators stay
    where they are. A ``joint`` rule matches one reader of a value and fires for all its readers or for none; if it
    reweights too, it looks through views that keep the last dimension. ``module`` is where a rule is written whose pattern
    is shared. ``vectors`` are frozen operands that no operator of the pattern reads: a calibration hands them over for a
    site.
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
    reweights: bool = False
    joint: bool = False
    vectors: tuple[str, ...] = ()
    module: str | None = None

    @property
    def name(self) -> str:
        return (self.module or self.pattern.__module__).rpartition(".")[2]

    @property
    def title(self) -> str:
        doc = sys.modules[self.module or self.pattern.__module__].__doc__ or ""
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
