"""Published recipes for decoders: FlexQ and FireQ.

FlexQ: nearest 6-bit weights, dynamic activations of 6 bits, and of 8 where that matters most. Linears are taken in classes
by the last part of their name (``down_proj``); the loss of a class is the squared error of its outputs relative to their
square, when its inputs alone are coded with 6 bits. Classes with the largest loss get 8 bits as long as they have at most
0.3 of all multiplications (ours: in Llama that is down_proj, the publication's outcome). Sites that got 8 bits have the
scheme ``w6a8``, so compile without ``scheme``. Unconfirmed: the publication's metric, which is ΔPPL or an error of outputs.
Scales are those of a channel and of a token; the publication has groups of 128 of both.

FireQ: 4-bit weights in groups of 128 whose scales are rounded to FP8 e4m3 after a power of two for the tensor, and columns
of the MLP's weights brought to one mean magnitude. Differences: activations are 8-bit integers per token instead of FP8
e4m3; codes are -7 .. 7, and weights are not rounded to FP8 once more; constants such as Llama-3-8B's 0.0096 do not matter
then, since a common factor goes into the scales; keys are not scaled, because nothing that is coded here reads them.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fxquant.calibration.migration import fireq
from fxquant.calibration.recipes.base import Gathered, Recipe
from fxquant.calibration.rounding import flexq, nearest
from fxquant.calibration.rounding.grid import encode
from fxquant.calibration.seen import Seen
from fxquant.calibration.site import SiteCalibration
from fxquant.errors import CalibrationError
from fxquant.reference import fake_quant_per_token
from fxquant.schemes import Scheme

PROMOTED_SHARE = 0.3  # of all multiplications may have 8-bit inputs
EQUALIZED = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "fc1", "fc2")  # of an MLP, by the usual names


def class_of(name: str) -> str:
    """``down_proj`` of the site ``model.layers.3.mlp.down_proj:linear``."""
    return name.rpartition(":")[0].rpartition(".")[2]


def promoted(gathered: Mapping[str, Gathered]) -> dict[str, Scheme]:
    """FlexQ's schemes of all sites.

    Raises:
        CalibrationError: the scheme is not ``w6a6``.
    """
    loss: dict[str, float] = {}
    cost: dict[str, float] = {}
    for name, site in gathered.items():
        if (site.scheme.weight_bits, site.scheme.act_bits, site.scheme.group) != (flexq.BITS, flexq.LOW_BITS, 0):
            raise CalibrationError(f"{name}: flexq codes linears of the scheme w6a6, not of {site.scheme}")
        kind = class_of(name)
        loss[kind] = loss.get(kind, 0.0) + input_loss(site, flexq.LOW_BITS)
        cost[kind] = cost.get(kind, 0.0) + site.weight.numel()
    bits = flexq.promote(loss, cost, PROMOTED_SHARE * sum(cost.values()))
    return {name: Scheme(flexq.BITS, bits[class_of(name)]) for name in gathered}


def input_loss(site: Gathered, bits: int) -> float:
    """The squared error of a linear's output relative to its square, with nothing but its input coded."""
    wanted = site.rows @ site.weight.T
    change = fake_quant_per_token(site.rows, bits) @ site.weight.T - wanted
    return float(change.square().sum() / wanted.square().sum().clamp_min(torch.finfo(torch.float32).tiny))


def _flexq(gathered: Gathered) -> SiteCalibration | None:
    return gathered.calibrated(rounding=nearest.round_weight, note="dynamic: FlexQ's activations are")


def _fireq(gathered: Gathered) -> SiteCalibration | None:
    if gathered.scheme.weight_bits != 4 or gathered.scheme.is_weight_only:
        raise CalibrationError(f"{gathered.site.name}: fireq codes linears of w4a8 and w4a8-g<size>, not of {gathered.scheme}")
    is_equalized = class_of(gathered.site.name) in EQUALIZED
    factor = fireq.column_factor(gathered.weight, float(gathered.weight.abs().mean())) if is_equalized else None
    return gathered.calibrated(factor=factor, rounding=fp8_scaled, note="dynamic: FireQ's activations are")


def fp8_scaled(weight: Tensor, bits: int, group: int, seen: Seen) -> tuple[Tensor, Tensor]:
    """Nearest codes for the scales T⁻¹ e4m3(T max|w| / m) of channels or groups."""
    power = fireq.tensor_scale(weight, group, qmax=2 ** (bits - 1) - 1)
    _, scale = nearest.round_weight(weight * power, bits, group)
    scale = fireq.fp8_scale(scale) / power
    return encode(weight, scale, bits, group), scale


FLEXQ = Recipe(
    "flexq", "FlexQ, arXiv 2508.04405: w6a6 with w6a8 for the class that loses most", _flexq, ("rows",), schemes=promoted
)
FIREQ = Recipe("fireq", "FireQ, arXiv 2505.20839: FP8 scales, even columns of an MLP; integer activations", _fireq)
