"""The coding of a linear's input that comes from GELU, by a published method, per tensor.

| method | format | found by the error of x Wᵀ |
|---|---|---|
| minmax | affine | nothing: the extent |
| ptq4vit | twin uniform | the ratio 2^m of the steps |
| adalog | AdaLog of x + 0.16997 | scale and base |

vit-quantizers sections 4 and 9. ptq4vit's published error is weighted by gradients, which the samples do not have.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fxquant.calibration.observers import Samples
from fxquant.calibration.searches import Choice, Product, adalog_scale_and_base, min_max, twin_ratio
from fxquant.calibration.searches.metric import Metric
from fxquant.calibration.site import StaticCoding
from fxquant.coding import Coding
from fxquant.errors import CalibrationError
from fxquant.formats import AdaLog, TwinGelu, Uniform
from fxquant.formats.adalog import GELU_SHIFT
from fxquant.granularity import PerChannel, PerTensor

SLACK = 1e-4  # that a GELU may lie below the minimum by rounding


def choose_after_gelu(site: str, x: Tensor, weight: Tensor, method: str, bits: int) -> StaticCoding:
    """The coding of rows x [R, K], outputs of GELU, that a linear with weight [N, K] reads; float32.

    Raises:
        CalibrationError: the method is unknown, or values lie below the minimum of GELU, so that something else made them.
    """
    if method not in METHODS:
        raise CalibrationError(f"{site}: unknown method {method!r} after GELU; known: {', '.join(METHODS)}")
    least = float(x.amin())
    if least < -GELU_SHIFT - SLACK:
        raise CalibrationError(f"{site}: the input reaches {least:g}, below the minimum of GELU; code it as another input")
    samples = Samples.of(site, x)
    with torch.no_grad():
        metric = Product(site, x, weight.to(torch.float32), PerTensor(), PerChannel(0)).metric("left")
        choice = METHODS[method](metric, samples, bits)
    return StaticCoding(Coding(choice.format, PerTensor()), choice.qparams)


METHODS: dict[str, Callable[[Metric, Samples, int], Choice]] = {
    "minmax": lambda metric, samples, bits: min_max(samples, Uniform(bits)),
    "ptq4vit": lambda metric, samples, bits: twin_ratio(metric, TwinGelu(bits), 1),
    "adalog": lambda metric, samples, bits: adalog_scale_and_base(metric, samples, AdaLog(bits, shift=GELU_SHIFT)),
}
