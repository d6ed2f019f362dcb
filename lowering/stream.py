"""From a float weight to the stream that decode kernels read: 2, 4 or 8 bits, a scale an output channel or a group."""

import torch
from torch import Tensor

from fxquant.lowering.pack import Codes, check_weight
from fxquant.reference import quantize_weight_groups
from fxquant.schemes import Scheme


def round_weight_groups(weight: Tensor, scheme: Scheme) -> Codes:
    """The codes int8 [N, K] and scales float32 [N, G] of a float weight [N, K].

    Raises:
        PackError: as ``check_weight`` does.
    """
    check_weight(weight)
    return Codes(*quantize_weight_groups(weight, scheme.weight_bits, scheme.group), scheme.group)


def pack_stream_codes(rounded: Codes, scheme: Scheme) -> Tensor:
    """The packed form (uint8 vector) of a rounded weight; its length depends on N, K and the scheme only."""
    packed: Tensor = torch.ops.fxquant.pack_stream(
        rounded.codes, rounded.scale, scheme.weight_bits, scheme.act_bits, scheme.group
    )
    return packed


def pack_stream(weight: Tensor, scheme: Scheme) -> Tensor:
    """The packed form of a float weight [N, K]; raises as ``round_weight_groups`` does."""
    return pack_stream_codes(round_weight_groups(weight, scheme), scheme)
