"""Recognise: many spellings become one operator. The order of the rules is the order of this list."""

from torch import fx

from fxquant.passes.match import apply
from fxquant.passes.recognise import (
    attention,
    boolean_attention,
    clipped_attention,
    einsum_attention,
    einsum_linear,
    gated_attention,
    gelu,
    layer_norm,
    linear,
    quick_gelu,
    rms_norm,
    sigmoid_attention,
    silu,
    softmax,
    temperature,
)
from fxquant.passes.rule import Event, Rule

RULES: tuple[Rule, ...] = (
    gelu.ERF,
    gelu.TANH,
    quick_gelu.RULE,
    silu.RULE,
    layer_norm.RULE,
    rms_norm.RULE,
    softmax.RULE,
    *attention.RULES,
    *temperature.RULES,
    einsum_attention.RULE,
    boolean_attention.RULE,
    *sigmoid_attention.RULES,
    clipped_attention.RULE,
    gated_attention.RULE,
    linear.RULE,
    einsum_linear.RULE,
)


def recognise(gm: fx.GraphModule) -> list[Event]:
    """Apply every recognition rule to a graph in normal form; returns what fired and what was refused."""
    return apply(RULES, gm)
