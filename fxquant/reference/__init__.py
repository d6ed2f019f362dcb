"""What each fxquant:: operator means, in plain PyTorch: slow, clear, and what every kernel must equal."""

from fxquant.reference.linear import (
    MAX_K,
    SMALLEST,
    fake_quant_per_channel,
    fake_quant_per_token,
    linear_dynamic,
    linear_static,
    linear_sums,
    quantize_activation,
    quantize_static,
    quantize_weight,
)

__all__ = [
    "MAX_K",
    "SMALLEST",
    "fake_quant_per_channel",
    "fake_quant_per_token",
    "linear_dynamic",
    "linear_static",
    "linear_sums",
    "quantize_activation",
    "quantize_static",
    "quantize_weight",
]
