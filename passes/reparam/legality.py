"""What must hold before a weight is changed; the sentences are the same for every rule."""

from collections.abc import Iterable

import torch
from torch import Tensor

from fxquant.passes.match import Match

UNTIED = "the changed weights must be read nowhere else: tied weights and shared norms keep theirs"
FROZEN = "what is changed must be made of weights alone"
FULL = "x and the weights must be float32 or float64 of one kind: in half precision a fold would round them once more"
POSITIVE = "the factor must be positive, finite and between 1e-4 and 1e4"
VECTOR = "a vector of the calibration must have one value a channel and the dtype of the weights"
WHOLE = "exponents and zero points must be whole numbers"
SMALLEST, LARGEST = 1e-4, 1e4


def are_untied(m: Match, *names: str) -> bool:
    """Whether nothing beside the matched operators reads these operands."""
    return not any(m.is_read_elsewhere(name) for name in names)


def are_frozen(m: Match, *names: str) -> bool:
    """Whether these operands, as far as they are there, are weights."""
    return all(m.is_frozen(name) for name in names if getattr(m, name) is not None)


def are_full(m: Match, *names: str) -> bool:
    """Whether these operands and every matched value have one dtype, float32 or float64."""
    dtypes = {value.dtype for name in names if isinstance(value := getattr(m, name), Tensor)}
    return len(dtypes) == 1 and dtypes <= {torch.float32, torch.float64} and m.is_computed_in(*dtypes)


def has_size(value: object, *sizes: object) -> bool:
    """Whether a tensor has exactly these sizes, compared as text: no guard is added."""
    return isinstance(value, Tensor) and tuple(map(str, value.shape)) == tuple(map(str, sizes))


def are_positive(vectors: Iterable[Tensor | None]) -> bool:
    """Whether vectors are factors that can be divided by; one whose value is not known is trusted."""
    return all(v is None or bool(((v >= SMALLEST) & (v <= LARGEST)).all()) for v in vectors)


def are_whole(vectors: Iterable[Tensor | None]) -> bool:
    """Whether vectors hold whole numbers; one whose value is not known is trusted."""
    return all(v is None or bool((v.isfinite() & (v == v.round())).all()) for v in vectors)
