"""What each fxquant:: operator means, in plain PyTorch: slow, clear, and what every kernel must equal."""

from fxquant.reference.linear import (
    MAX_K,
    SMALLEST,
    fake_quant_per_channel,
    fake_quant_per_token,
    fake_quant_static,
    linear_dynamic,
    linear_static,
    linear_sums,
    quantize_activation,
    quantize_static,
    quantize_weight,
)
from fxquant.reference.stream import (
    fake_quant_per_group,
    float_tolerance,
    group_sums,
    linear_groups,
    linear_table,
    linear_weight_only,
    quantize_weight_groups,
    spread,
    table_tolerance,
)

__all__ = [
    "MAX_K",
    "SMALLEST",
    "fake_quant_per_channel",
    "fake_quant_per_group",
    "fake_quant_per_token",
    "fake_quant_static",
    "float_tolerance",
    "group_sums",
    "linear_dynamic",
    "linear_groups",
    "linear_static",
    "linear_sums",
    "linear_table",
    "linear_weight_only",
    "quantize_activation",
    "quantize_static",
    "quantize_weight",
    "quantize_weight_groups",
    "spread",
    "table_tolerance",
]
