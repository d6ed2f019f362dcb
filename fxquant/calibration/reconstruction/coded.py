"""A linear as a site's calibration has it: what its weight multiplies, and the whole of it, in float."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import Tensor

from fxquant.calibration.channel_coding import ChannelCoding
from fxquant.calibration.qparams import StaticQParams
from fxquant.calibration.site import Migration, SiteCalibration, StaticCoding, WeightCodes, weight_digest
from fxquant.calibration.study import Linear, LinearSite
from fxquant.format_schemes import FormatScheme
from fxquant.lowering.pack import round_weight
from fxquant.reference import fake_quant_per_token, fake_quant_static, quantize_activation, quantize_static
from fxquant.schemes import LinearScheme, Scheme


class CodedLinear:
    """One site: its activations as ``known`` codes them, its weight in the units in which it is rounded.

    A static step or a migration's factor is divided out of the input, ``rows``, and is in ``weight``, float32 [N, K]; a shift
    is taken off the input before, and is in ``bias`` by the weight as it came, as in ``calibration.site``.
    """

    def __init__(self, site: LinearSite, known: SiteCalibration) -> None:
        self.site, self.known = site, known
        static, migration = known.static, known.migration
        self._static = static if isinstance(static, StaticQParams) and known.is_accurate else None
        self._factor = migration.factor if migration is not None else None
        self._shift = migration.shift if migration is not None else None
        self.unit = self._static.scale if self._static is not None else 1.0  # of ``weight``: the scale of the tensor
        by = self._static.steps if self._static is not None else self._factor
        self.weight = self._source if by is None else self._source * by

    @property
    def scheme(self) -> Scheme:
        """The integer scheme of the site."""
        assert isinstance(self.site.scheme, Scheme)
        return self.site.scheme

    @cached_property
    def _source(self) -> Tensor:
        """The weight as it came, float32 [N, K]."""
        return self.site.weight.detach().to(torch.float32)

    @property
    def channel_coding(self) -> ChannelCoding | None:
        """The coding of every channel that static steps and a shift stand for, if they do."""
        return None if self._static is None or self._shift is None else ChannelCoding.of(self._static, self._shift)

    def with_channels(self, coding: ChannelCoding) -> "CodedLinear":
        """The same linear with another coding of its channels."""
        static, shift = coding.as_one(self.scheme.act_bits)
        return CodedLinear(self.site, replace(self.known, static=static, migration=Migration(shift=shift)))

    def rows(self, x: Tensor, is_coded: bool = True) -> Tensor:
        """What the weight multiplies, [..., K]; not ``is_coded``: with activations left in float."""
        moved, static, scheme = self._moved(x), self._static, self.site.scheme
        if static is not None:
            inputs, bits = static.inputs, self.scheme.act_bits
            coded = fake_quant_static(moved, inputs["steps"], inputs["zero_point"], bits) if is_coded else moved
            return coded / static.steps
        if not is_coded or scheme is None:
            return moved
        format_ = self._format
        return fake_quant_input(moved, scheme) if format_ is None else format_.coding.fake_quant(moved, format_.qparams)

    def act_codes(self, x: Tensor) -> Tensor | None:
        """The integers that stand for an input, by their distance from that of zero; None where it stays float."""
        moved, static, scheme = self._moved(x), self._static, self.site.scheme
        if static is not None:
            inputs = static.inputs
            found = quantize_static(moved, inputs["steps"], inputs["zero_point"], self.scheme.act_bits).to(torch.int16)
            return found - static.zero_point
        if self._format is not None:
            coding, qparams = self._format.coding, self._format.qparams
            return coding.format.quantize(coding.granularity.blocks(moved), qparams)
        if not isinstance(scheme, Scheme) or scheme.is_weight_only:
            return None
        found, _, zero_point = quantize_activation(moved, scheme.act_bits)
        return found.to(torch.int16) - zero_point[..., None].to(torch.int16)

    def bias(self, bias: Tensor | None) -> Tensor | None:
        """What is added to the product, float32 [N] or None: the linear's bias, and what the shift took off."""
        wide = None if bias is None else bias.to(torch.float32)
        if self._shift is None:
            return wide
        moved = self._source @ self._shift
        return moved if wide is None else wide + moved

    def rounded(self, codes: Tensor, scale: Tensor) -> SiteCalibration:
        """The site with these codes for its weight."""
        source, group = weight_digest(self.site.weight), self.scheme.group
        return replace(self.known, codes=WeightCodes(codes, scale, source, group))

    @property
    def value(self) -> Tensor:
        """The rounded weight, float32 [N, K]: that of the codes, or to the nearest.

        Raises:
            PackError: it cannot be rounded.
        """
        if self.known.codes is not None:
            return self.known.codes.value
        assert self.site.scheme is not None
        return round_weight(self.weight, self.site.scheme).value

    @property
    def _format(self) -> StaticCoding | None:
        """The number format that a calibration gave the input, where it is coded at all."""
        static, scheme = self.known.static, self.site.scheme
        is_float = isinstance(scheme, Scheme) and scheme.is_weight_only
        return static if isinstance(static, StaticCoding) and not is_float else None

    def _moved(self, x: Tensor) -> Tensor:
        """The input in float32 after shift and factor."""
        wide = x.to(torch.float32) if self._shift is None else x.to(torch.float32) - self._shift
        return wide if self._factor is None else wide / self._factor


def fake_quant_input(x: Tensor, scheme: LinearScheme) -> Tensor:
    """x as the dynamic activations of a scheme leave it."""
    if isinstance(scheme, FormatScheme):
        return x if scheme.activation is None else scheme.activation.fake_quant(x)
    return x if scheme.is_weight_only else fake_quant_per_token(x, scheme.act_bits)


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
