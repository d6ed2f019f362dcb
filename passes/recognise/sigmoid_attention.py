"""sigmoid(s · q kᵀ + bias + mask) v  →  fxquant::sigmoid_attention(q, k, v, mask, scale=s, bias=bias)

Each weight stands on its own, so one sweep over the keys does it all and no N x M buffer is needed. The usual bias is
-log N, a number once the graph is captured. A weight hidden by -inf is 0 on both sides; no row can become NaN by it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fxquant import ops
from fxquant.passes.match import Match
from fxquant.passes.recognise.attention import SCALE, SCORES
from fxquant.passes.rule import REAL, Rule, Samples, lemma

OPERATORS = ops.LIBRARY  # importing ops defines the operator
HIDDEN = -104.0  # from here down the sigmoid of a float32 rounds to 0


def _rule(place: str) -> Rule:
    scores, factor = SCORES[place], SCALE[place]

    def pattern(q: Any, kt: Any, v: Any, s: Any, shift: Any) -> Any:
        return torch.matmul(torch.sigmoid(scores(q, kt, s) - shift), v)

    def rewrite(
        q: Tensor,
        kt: Tensor,
        v: Tensor,
        s: float | None,
        bias: Tensor | float | None,
        shift: float | None,
        mask: Tensor | float | None,
        hidden: Tensor | None,
        kept: Tensor | None,
        **unused: Any,
    ) -> Tensor:
        masks = [value for value in (bias, mask, kept) if isinstance(value, Tensor)]
        masks += [] if hidden is None else [~hidden]
        numbers = [float(value) for value in (bias, mask) if isinstance(value, (int, float))]
        op = torch.ops.fxquant.sigmoid_attention.default
        settings = (factor(1.0 if s is None else s), sum(numbers) - (shift or 0.0), False)
        made: Tensor = op(q, kt.transpose(-2, -1), v, masks[0] if masks else None, None, *settings)
        return made

    return Rule(
        pattern,
        precondition,
        rewrite,
        shapes={"q": "b h n d", "kt": "b h d m", "v": "b h m e", "mask": "n m", "hidden": "n m", "kept": "n m"},
        error_class=REAL,
        proof=lemma(
            "the operator is defined as sigmoid(scale q kᵀ + bias + mask) v, with weight 0 where a boolean mask hides a key; "
            "the sigmoid of -inf is 0, and that of any number below -104 is 0 in float32"
        ),
        near_misses=NEAR_MISSES if place == "mul" else {},
        spellings=_spellings(scores),
        samples=Samples(
            {"s": 0.35, "bias": -1.6, "shift": 1.6, "hidden": "boolean", "kept": "boolean", "fill": float("-inf")},
            scale=(0.1, 1.0),
        ),
    )


def _spellings(scores: Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
    """The other spellings. Where two values are added, bias and mask may come in either order."""

    def plain(q: Any, kt: Any, v: Any, s: Any) -> Any:
        return torch.matmul(torch.sigmoid(scores(q, kt, s)), v)

    def masked(q: Any, kt: Any, v: Any, s: Any, mask: Any) -> Any:
        return torch.matmul(torch.sigmoid(scores(q, kt, s) + mask), v)

    def masked_and_biased(q: Any, kt: Any, v: Any, s: Any, bias: Any, mask: Any) -> Any:
        return torch.matmul(torch.sigmoid((scores(q, kt, s) + bias) + mask), v)

    def masked_after_shift(q: Any, kt: Any, v: Any, s: Any, shift: Any, mask: Any) -> Any:
        return torch.matmul(torch.sigmoid((scores(q, kt, s) - shift) + mask), v)

    def masked_before_shift(q: Any, kt: Any, v: Any, s: Any, shift: Any, mask: Any) -> Any:
        return torch.matmul(torch.sigmoid((scores(q, kt, s) + mask) - shift), v)

    def filled(q: Any, kt: Any, v: Any, s: Any, hidden: Any, fill: Any) -> Any:
        return torch.matmul(torch.sigmoid(scores(q, kt, s).masked_fill(hidden, fill)), v)

    def filled_after_bias(q: Any, kt: Any, v: Any, s: Any, bias: Any, hidden: Any, fill: Any) -> Any:
        return torch.matmul(torch.sigmoid((scores(q, kt, s) + bias).masked_fill(hidden, fill)), v)

    def filled_after_shift(q: Any, kt: Any, v: Any, s: Any, shift: Any, hidden: Any, fill: Any) -> Any:
        return torch.matmul(torch.sigmoid((scores(q, kt, s) - shift).masked_fill(hidden, fill)), v)

    def filled_before_shift(q: Any, kt: Any, v: Any, s: Any, shift: Any, hidden: Any, fill: Any) -> Any:
        return torch.matmul(torch.sigmoid(scores(q, kt, s).masked_fill(hidden, fill) - shift), v)

    def chosen(q: Any, kt: Any, v: Any, s: Any, kept: Any, fill: Any) -> Any:
        return torch.matmul(torch.sigmoid(torch.where(kept, scores(q, kt, s), fill)), v)

    def chosen_after_shift(q: Any, kt: Any, v: Any, s: Any, shift: Any, kept: Any, fill: Any) -> Any:
        return torch.matmul(torch.sigmoid(torch.where(kept, scores(q, kt, s) - shift, fill)), v)

    sums = (plain, masked, masked_and_biased, masked_after_shift, masked_before_shift)
    fills = (filled, filled_after_bias, filled_after_shift, filled_before_shift)
    return (*sums, *fills, chosen, chosen_after_shift)


_WEIGHTS = "k and v must not be weights: this is a feed-forward block with sigmoid in its middle"
_FLOAT = "q, k and v must be float32 or float64 on the CPU, where the kernel is"
_BIAS = "the bias must be a number, beside one mask at most"
_MASK = "the mask must be a tensor of q's dtype with 2 dimensions up to those of q"
_BOOLEAN = "the boolean mask must have 2 dimensions up to those of q"
_FILL = f"hidden scores must be filled with {HIDDEN:g} or less: only then is their weight 0"


def precondition(m: Match) -> Iterator[tuple[str, bool]]:
    yield "q, k and v must be tensors of 3 or 4 dimensions", all(v.dim() in (3, 4) for v in (m.q, m.kt, m.v))
    yield "q, k and v must share their batch and head sizes", len({_lead(v) for v in (m.q, m.kt, m.v)}) == 1
    yield _WEIGHTS, not (m.is_frozen("kt") or m.is_frozen("v"))
    yield _FLOAT, all(_is_supported(v) and v.dtype == m.q.dtype for v in (m.q, m.kt, m.v))
    yield "the scale must be a number", m.s is None or _is_number(m.s)
    masks = [value for value in (m.bias, m.mask) if isinstance(value, Tensor)]
    numbers = [value for value in (m.bias, m.mask, m.shift) if value is not None and not any(value is t for t in masks)]
    yield _BIAS, len(masks) <= 1 and all(_is_number(value) for value in numbers)
    yield _MASK, all(_is_mask(value, m.q) and value.dtype == m.q.dtype for value in masks)
    booleans = [value for value in (m.hidden, m.kept) if value is not None]
    yield _BOOLEAN, all(_is_mask(value, m.q) and value.dtype == torch.bool for value in booleans)
    yield _FILL, not booleans or (_is_number(m.fill) and m.fill <= HIDDEN)


def _lead(x: Tensor) -> tuple[str, ...]:
    return tuple(map(str, x.shape[:-2]))  # compared as text: a comparison of symbolic sizes would add a guard


def _is_supported(x: Tensor) -> bool:
    return x.dtype in (torch.float32, torch.float64) and x.device.type == "cpu"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_mask(mask: Any, q: Tensor) -> bool:
    return isinstance(mask, Tensor) and 2 <= mask.dim() <= q.dim()


NEAR_MISSES: dict[str, dict[str, Any]] = {
    "q, k and v must be tensors of 3 or 4 dimensions": {"q": "n d", "kt": "d m", "v": "m e"},
    "q, k and v must share their batch and head sizes": {"v": "one h m e"},
    _WEIGHTS: {"v": "frozen b h m e"},
    _FLOAT: {"q": torch.bfloat16, "kt": torch.bfloat16, "v": torch.bfloat16},
    "the scale must be a number": {"s": "b h n m"},
    _BIAS: {"shift": "b h n m"},
    _MASK: {"mask": "m"},
    _BOOLEAN: {"hidden": torch.ones(5, dtype=torch.bool)},
    _FILL: {"hidden": torch.bool, "fill": -2.0},
}
RULES = tuple(_rule(place) for place in SCORES)
