"""A linear as a site's calibration has it: what its weight multiplies, and the whole of it, in float."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxquant.calibration.channel_coding import ChannelCoding
from fxquant.calibration.qparams import StaticQParams
from fxquant.calibration.site import Migration, SiteCalibration, WeightCodes, weight_digest
from fxquant.calibration.study import Linear
from fxquant.reference import fake_quant_per_token, fake_quant_static

if TYPE_CHECKING:
    from fxquant.calibration.recipes.base import Gathered


class CodedLinear:
    """One site: its activations as ``known`` codes them, its weight in the units in which it is rounded.

    A static step or a migration's factor is divided out of the input, ``rows``, and is in ``weight``, float32 [N, K]; a shift
    is taken off the input before, and is in ``bias`` by the weight as it came, as in ``calibration.site``.
    """

    def __init__(self, gathered: "Gathered", known: SiteCalibration) -> None:
        self.gathered, self.known = gathered, known
        static, migration = known.static, known.migration
        self._static = static if isinstance(static, StaticQParams) and known.is_accurate else None
        self._factor = migration.factor if migration is not None else None
        self._shift = migration.shift if migration is not None else None
        self.unit = self._static.scale if self._static is not None else 1.0  # of ``weight``: the scale of the tensor
        by = self._static.steps if self._static is not None else self._factor
        self.weight = gathered.weight if by is None else gathered.weight * by

    @property
    def channel_coding(self) -> ChannelCoding | None:
        """The coding of every channel that static steps and a shift stand for, if they do."""
        return None if self._static is None or self._shift is None else ChannelCoding.of(self._static, self._shift)

    def with_channels(self, coding: ChannelCoding) -> "CodedLinear":
        """The same linear with another coding of its channels."""
        static, shift = coding.as_one(self.gathered.scheme.act_bits)
        return CodedLinear(self.gathered, replace(self.known, static=static, migration=Migration(shift=shift)))

    def rows(self, x: Tensor, is_coded: bool = True) -> Tensor:
        """What the weight multiplies, [..., K]; not ``is_coded``: with activations left in float."""
        bits = self.gathered.scheme.act_bits
        wide = x.to(torch.float32) if self._shift is None else x.to(torch.float32) - self._shift
        if self._static is not None:
            inputs = self._static.inputs
            coded = fake_quant_static(wide, inputs["steps"], inputs["zero_point"], bits) if is_coded else wide
            return coded / self._static.steps
        wide = wide if self._factor is None else wide / self._factor
        return wide if self.gathered.scheme.is_weight_only or not is_coded else fake_quant_per_token(wide, bits)

    def bias(self, bias: Tensor | None) -> Tensor | None:
        """What is added to the product, float32 [N] or None: the linear's bias, and what the shift took off."""
        wide = None if bias is None else bias.to(torch.float32)
        if self._shift is None:
            return wide
        moved = self.gathered.weight @ self._shift
        return moved if wide is None else wide + moved

    def rounded(self, codes: Tensor, scale: Tensor) -> SiteCalibration:
        """The site with these codes for its weight."""
        source, group = weight_digest(self.gathered.site.weight), self.gathered.scheme.group
        return replace(self.known, codes=WeightCodes(codes, scale, source, group))


def computed(linear: CodedLinear, value: Callable[[], Tensor]) -> Linear:
    """What computes the linear with the rounded weight [N, K] that ``value`` gives."""

    def compute(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(linear.rows(x), value(), linear.bias(bias)).to(x.dtype)

    return compute


def as_overrides(linears: Mapping[str, CodedLinear], done: Mapping[str, SiteCalibration]) -> dict[str, Linear]:
    """What computes the sites that have codes; a weight is there only while it multiplies."""
    codes = {name: each.codes for name, each in done.items()}
    return {name: computed(linears[name], partial(_value, each)) for name, each in codes.items() if each is not None}


def _value(codes: WeightCodes) -> Tensor:
    return codes.value
