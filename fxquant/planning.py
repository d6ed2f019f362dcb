"""The plan stage: every candidate site gets a scheme with a packed weight, a kernel, or a reason why it stays float."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxquant.binding import Packed, Slot, frozen_value
from fxquant.calibration.attention import attention_path
from fxquant.calibration.qparams import StaticQParams
from fxquant.calibration.site import Migration, SiteCalibration, StaticCoding, WeightCodes, weight_digest
from fxquant.config import FxQuantConfig
from fxquant.errors import PackError
from fxquant.format_schemes import FormatScheme
from fxquant.linear_choice import FLOAT_TOLERANCE, LinearChoice, choose_linear, not_worth_binding
from fxquant.linear_formats import FLOAT_OPERATOR, PANEL, format_of, operator_of
from fxquant.lowering.pack import Codes, Rounded, check_weight, pack_codes, round_weight, weight_error
from fxquant.lowering.pack_table import round_to_table
from fxquant.lowering.timings import Timing
from fxquant.passes.fuse import FUSIONS
from fxquant.passes.fuse.attention import decide_calibrated
from fxquant.passes.fuse.fusion import Verdict
from fxquant.passes.rule import REAL
from fxquant.plan import FLOAT_KINDS, Decision, Plan, setting_for
from fxquant.schemes import LinearScheme, Scheme
from fxquant.sites import Site, find_sites, kind_of

if TYPE_CHECKING:
    from fxquant.calibration.calibration import Calibration

# auto leaves a linear float when rounding its weights alone costs more than this in its worst output channel: 20 dB is
# an error of a tenth, where a user would notice. An explicit scheme has no such guard.
MIN_WEIGHT_SQNR_DB = 20.0
NO_KERNEL = "no integer kernel has this scheme: its specification runs in float"
NO_KERNEL_OF_CODING = "no integer kernel has an operand in a number format: its specification runs in float"
NO_CODING = "its operands stay float: the calibration has no coding of them, or the options ask for float"
NOT_CODED = "the calibration, which codes other attentions, has none for this one; it knows operands of four axes"
ANOTHER_WEIGHT = "the weight is not the one that the calibration rounded; calibrate again"


@dataclass(frozen=True)
class Planned:
    """A plan with what the later stages need.

    The node of each site, slot and packed weight of each linear that a kernel of ours computes, the verdict of each other
    such node, and what the measured table says about each linear.
    """

    plan: Plan
    nodes: Mapping[str, fx.Node]
    slots: Mapping[str, Slot]
    packed: Mapping[str, Packed]
    verdicts: Mapping[fx.Node, Verdict] = field(default_factory=dict)
    timings: Mapping[str, Timing] = field(default_factory=dict)

    @property
    def quantized(self) -> dict[str, tuple[int, int]]:
        """The taken linears that have a scheme, with the shapes [N, K] of their weights."""
        weights = {name: self.nodes[name].args[1] for name, slot in self.slots.items() if slot.scheme is not None}
        return {name: tuple(weight.meta["val"].shape) for name, weight in weights.items() if isinstance(weight, fx.Node)}

    @property
    def changes_nothing(self) -> bool:
        return not self.slots and not self.verdicts

    def without_contents(self) -> "Planned":
        """The same plan, holding no packed weight."""
        return replace(self, packed={site: packed.without_contents() for site, packed in self.packed.items()})

    def without(self, reasons: Mapping[str, str]) -> "Planned":
        """The same plan with some packed weights left float: reasons by the slot's site hold for all its sites."""
        lost = {site: reasons[slot.site] for site, slot in self.slots.items() if slot.site in reasons}
        slots = {site: slot for site, slot in self.slots.items() if site not in lost}
        return replace(self, plan=self.plan.refuse(lost), slots=slots)


def make_plan(gm: fx.GraphModule, config: FxQuantConfig, isa: str, args: Sequence[Any], dry_run: bool) -> Planned:
    """Decide every candidate site of a recognised graph. ``dry_run`` looks at weights but packs nothing."""
    decisions: list[Decision] = []
    nodes: dict[str, fx.Node] = {}
    verdicts: dict[fx.Node, Verdict] = {}
    choices: dict[str, LinearChoice] = {}
    shelf = _Shelf(args, dry_run)
    for node, sites in find_sites(gm.graph).items():
        nodes.update({site.name: node for site in sites})
        if kind_of(node) == "linear":
            choices.update({site.name: choose_linear(node, site, config, isa) for site in sites})
            decisions += [_decide_linear(node, site, choices[site.name], config, shelf) for site in sites]
            continue
        other = _decide_other(node, sites, config, isa)
        decisions += [_other_decision(site, other) for site in sites]
        if other is not None and other.is_taken:
            verdicts[node] = other
    timings = {site: choice.timing for site, choice in choices.items() if choice.timing is not None}
    return _worthwhile(Planned(Plan(tuple(decisions)), nodes, shelf.slots, shelf.packed, verdicts, timings), choices)


@dataclass
class _Shelf:
    """The slots of a graph while it is planned: sites that read one weight alike share one."""

    args: Sequence[Any]
    dry_run: bool
    slots: dict[str, Slot] = field(default_factory=dict)
    packed: dict[str, Packed] = field(default_factory=dict)
    _known: dict[Any, tuple[Slot, Packed]] = field(default_factory=dict)

    def take(
        self, site: Site, weight: fx.Node, scheme: LinearScheme | None, guarded: bool, known: SiteCalibration | None = None
    ) -> Packed:
        """Give a site its slot, unless the weight cannot be packed: the outcome says so."""
        static, migration, codes = (known.static, known.migration, known.codes) if known is not None else (None, None, None)
        key = (weight, scheme, guarded, static, migration, codes)
        if key not in self._known:
            packer = Packer(guarded, self.dry_run, static, migration, codes)
            slot = Slot(site.name, frozen_value(weight), scheme, packer, static, migration, codes)
            self._known[key] = slot, slot.pack(slot.weight(self.args), scheme)
            self.packed[site.name] = self._known[key][1]
        slot, outcome = self._known[key]
        if outcome.reason is None:
            self.slots[site.name] = slot
        return outcome


def _decide_linear(node: fx.Node, site: Site, choice: LinearChoice, config: FxQuantConfig, shelf: _Shelf) -> Decision:
    """A linear's scheme if its weight can be packed, else our float kernel or the graph's own operator."""
    weight, reason = node.args[1], choice.reason
    if choice.scheme is not None:
        assert isinstance(weight, fx.Node)
        n, k = weight.meta["val"].shape
        known, sentence = calibrated(site.name, choice.scheme, (int(n), int(k)), config.calibration)
        scheme = _with_static(choice.scheme, known)
        reason = shelf.take(site, weight, scheme, choice.is_auto, known).reason
        if reason is None:
            operator = operator_of(scheme)
            is_coded = isinstance(scheme, Scheme) and scheme.coding is not None
            lack = None if operator else NO_KERNEL_OF_CODING if is_coded else NO_KERNEL
            said = [part for part in (lack, sentence, choice.note) if part]
            return Decision(site, scheme, "; ".join(said) or None, kernel=operator, error_class="QUANTIZED")
    if not choice.own_float:
        return Decision(site, reason=reason)
    assert isinstance(weight, fx.Node)
    shelf.take(site, weight, None, choice.is_auto)
    return Decision(site, reason=f"{reason}; {FLOAT_TOLERANCE}", kernel=FLOAT_OPERATOR, error_class=REAL)


def _with_static(scheme: LinearScheme, known: SiteCalibration | None) -> LinearScheme:
    """A scheme with what a calibration says about the input."""
    static = None if known is None else known.static
    if isinstance(scheme, Scheme) and isinstance(static, StaticCoding):
        return replace(scheme, static=True, coding=static.coding.format.name)
    return replace(scheme, static=static is not None)


def _worthwhile(planned: Planned, choices: Mapping[str, LinearChoice]) -> Planned:
    """The plan, without its packed weights where all of them together gain less than looking after them costs."""
    gain = 0.0
    for name, slot in planned.slots.items():
        saved = choices[name].gain_us(own_float=slot.scheme is None)
        if saved is None or not choices[name].is_auto:
            return planned  # a setting, or a size without a measured time, asks for packed weights whatever they gain
        gain += saved
    sites = {slot.site for slot in planned.slots.values()}
    reason = not_worth_binding(gain, len(sites)) if sites else None
    return planned if reason is None else planned.without(dict.fromkeys(sites, reason))


def calibrated(
    name: str, scheme: LinearScheme, shape: tuple[int, int], calibration: "Calibration | None"
) -> tuple[SiteCalibration | None, str | None]:
    """What a calibration knows of a linear in a scheme, [N, K], or None; and the sentence why its input stays dynamic."""
    if calibration is None:
        return None, None
    form, found = format_of(scheme), calibration.find(name, scheme, shape)
    if isinstance(found, SiteCalibration) and isinstance(found.static, StaticCoding) and isinstance(scheme, Scheme):
        if scheme.is_weight_only:
            sentence = f"the calibration has a number format for the input, and {scheme} leaves it float"
            return replace(found, static=None), "; ".join(part for part in (sentence, found.note) if part)
        return found, found.note
    if scheme.is_weight_only:
        return (None, found) if isinstance(found, str) else (found, found.note)
    if form not in (PANEL, None) and (isinstance(found, str) or found.static is not None):
        return None, f"dynamic: {scheme} has no kernel with static activations"
    return (None, found) if isinstance(found, str) else (found, found.note)


def _decide_other(node: fx.Node, sites: tuple[Site, ...], config: FxQuantConfig, isa: str) -> Verdict | None:
    """The verdict on a node that is no linear; None where its kind has no kernel of ours."""
    fusion = FUSIONS.get(kind_of(node) or "")
    if fusion is None:
        return None
    settings = {site.kind: setting_for(site, config) for site in sites}
    calibrated = config.calibration.attention if config.calibration is not None else {}
    try:
        known = calibrated.get(attention_path(sites[0].name)) if kind_of(node) == "attention" else None
        verdict = decide_calibrated(node, settings, known) if known is not None else None
        decided = verdict or fusion.decide(node, settings, config, isa)
        if kind_of(node) == "attention" and calibrated and known is None:
            return replace(decided, reason=f"{NOT_CODED}; {decided.reason}")
        return decided
    except Exception as error:  # nothing that a decider does may cost the user more than this site
        return Verdict(f"it cannot be judged: {type(error).__name__}: {error}")


def _other_decision(site: Site, verdict: Verdict | None) -> Decision:
    if verdict is None:
        return Decision(site, reason=FLOAT_KINDS[site.kind])
    if verdict.calibrated is not None and site.kind not in verdict.schemes:
        return Decision(site, reason=NO_CODING)
    return Decision(site, verdict.schemes.get(site.kind), verdict.reason, verdict.kernel, verdict.error_class)


def float_plan(gm: fx.GraphModule, reason: str) -> Planned:
    """The plan that leaves every site of a recognised graph float for one reason; no weight is looked at."""
    found = [(node, site) for node, sites in find_sites(gm.graph).items() for site in sites]
    plan = Plan(tuple(Decision(site, reason=reason) for _, site in found))
    return Planned(plan, {site.name: node for node, site in found}, {}, {})


@dataclass(frozen=True)
class Packer:
    """Packs a weight, or says why it cannot be: not finite, or (``guarded``) rounded too coarsely.

    It is the weight times the factor of a migration, or times the steps of static qparams, that is packed; ``codes`` are
    its own where a calibration rounded it. Without a scheme it stays float32.
    """

    guarded: bool
    dry_run: bool = False
    static: StaticQParams | StaticCoding | None = None
    migration: Migration | None = None
    codes: WeightCodes | None = None

    def __call__(self, weight: Tensor, scheme: LinearScheme | None) -> Packed:
        """The packed weight of shape [out_features, in_features] or a reason."""
        if scheme is None:
            return Packed(None if self.dry_run else torch.ops.fxquant.pack_float(weight))
        effective = self._effective(weight)
        try:
            rounded = round_weight(effective, scheme) if self.codes is None else self._rounded(weight, effective, self.codes)
        except PackError as problem:
            return Packed(None, reason=str(problem))
        error = weight_error(effective, rounded)
        if self.guarded and error.worst_db < MIN_WEIGHT_SQNR_DB:
            return Packed(
                None,
                sqnr_db=error.overall_db,
                reason=f"auto: rounding the weight costs too much in its worst channel ({error.worst_db:.1f} dB "
                f"SQNR, {MIN_WEIGHT_SQNR_DB:.0f} dB wanted); an explicit scheme overrides this",
            )
        blob = None if self.dry_run else self._pack(rounded, effective, scheme)
        return Packed(blob, sqnr_db=error.overall_db, correction=None if self.dry_run else self._correction(weight))

    def _pack(self, rounded: Codes | Rounded, weight: Tensor, scheme: LinearScheme) -> Tensor:
        if isinstance(scheme, FormatScheme) and scheme.table_group is not None:
            return round_to_table(weight, scheme.weight).pack()
        packed = pack_codes(rounded, scheme)
        is_value = format_of(scheme) is None  # of the weight times the steps: without a kernel nothing divides by them
        return packed / self.static.steps if is_value and isinstance(self.static, StaticQParams) else packed

    def _rounded(self, weight: Tensor, effective: Tensor, codes: WeightCodes) -> Codes | Rounded:
        """What a calibration made of this very weight.

        Raises:
            PackError: the weight cannot be packed, or is another one.
        """
        check_weight(effective)
        if weight_digest(weight) != codes.source:
            raise PackError(ANOTHER_WEIGHT)
        if codes.coding is not None:
            return Rounded(codes.value)
        return Codes(codes.codes, codes.scale, codes.group)

    def _effective(self, weight: Tensor) -> Tensor:
        if self.migration is not None and self.migration.factor is not None:
            weight = weight.to(torch.float32) * self.migration.factor
        return weight.to(torch.float32) * self.static.steps if isinstance(self.static, StaticQParams) else weight

    def _correction(self, weight: Tensor) -> Tensor | None:
        shift = self.migration.shift if self.migration is not None else None
        return None if shift is None else torch.mv(weight.to(torch.float32), shift)
