"""The plan stage: every candidate site gets a scheme with a packed weight, a kernel, or a reason why it stays float."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxquant._compat import size_hint
from fxquant.binding import Packed, Slot, frozen_value
from fxquant.calibration.qparams import StaticQParams
from fxquant.config import FxQuantConfig
from fxquant.errors import PackError
from fxquant.linear_formats import PANEL, STATIC, format_of
from fxquant.lowering.pack import pack_codes, round_weight, weight_error
from fxquant.lowering.timings import Timing, linear_timing
from fxquant.passes.fuse import FUSIONS
from fxquant.passes.fuse.fusion import Verdict
from fxquant.passes.quantize.linear import conditions
from fxquant.plan import FLOAT_KINDS, Decision, Plan, resolve_scheme, setting_for
from fxquant.schemes import Scheme
from fxquant.sites import Site, find_sites, kind_of

# auto leaves a linear float when rounding its weights alone costs more than this in its worst output channel: 20 dB is
# an error of a tenth, where a user would notice. An explicit scheme has no such guard.
MIN_WEIGHT_SQNR_DB = 20.0
# Without a table of measured times auto leaves a linear float below this many weights: for 16 to 128 rows, quantizing
# them then costs as much as the integer product saves.
MIN_WEIGHTS = 32768


@dataclass(frozen=True)
class Planned:
    """A plan with what the later stages need.

    The node of each site, slot and packed weight of each taken linear, and the verdict of each other node that a kernel
    of ours computes.
    """

    plan: Plan
    nodes: Mapping[str, fx.Node]
    slots: Mapping[str, Slot]
    packed: Mapping[str, Packed]
    verdicts: Mapping[fx.Node, Verdict] = field(default_factory=dict)

    @property
    def could_be_static(self) -> list[str]:
        """The taken linears whose scheme has a static form."""
        return [name for name, slot in self.slots.items() if format_of(slot.scheme) in (PANEL, STATIC)]

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
    slots: dict[str, Slot] = {}
    packed: dict[str, Packed] = {}
    known: dict[tuple[fx.Node, Scheme, StaticQParams | None], Slot] = {}
    verdicts: dict[fx.Node, Verdict] = {}
    for node, sites in find_sites(gm.graph).items():
        nodes.update({site.name: node for site in sites})
        if kind_of(node) != "linear":
            other = _decide_other(node, sites, config, isa)
            decisions += [_other_decision(site, other) for site in sites]
            if other is not None and other.kernel is not None:
                verdicts[node] = other
            continue
        for site in sites:
            verdict = _verdict(node, site, config, isa)
            if isinstance(verdict, str):
                decisions.append(Decision(site, reason=verdict))
                continue
            weight = node.args[1]
            assert isinstance(weight, fx.Node)
            static, sentence = _calibrated(site, verdict, weight, config)
            scheme = replace(verdict, static=static is not None)
            slot = known.get((weight, scheme, static))
            if slot is None:
                guarded = setting_for(site, config) == "auto"
                slot = Slot(site.name, frozen_value(weight), scheme, Packer(guarded, dry_run, static), static)
                known[weight, scheme, static] = slot
                packed[site.name] = slot.pack(slot.weight(args), scheme)
            result = packed[slot.site]
            if result.reason is not None:
                decisions.append(Decision(site, reason=result.reason))
            else:
                kernel = format_of(scheme).operator
                decisions.append(Decision(site, scheme, sentence, kernel=kernel, error_class="QUANTIZED"))
                slots[site.name] = slot
    return Planned(Plan(tuple(decisions)), nodes, slots, packed, verdicts)


def _calibrated(site: Site, scheme: Scheme, weight: fx.Node, config: FxQuantConfig) -> tuple[StaticQParams | None, str | None]:
    """The static qparams of a site, or None and (where a calibration was given) the sentence why it stays dynamic."""
    if config.calibration is None or scheme.is_weight_only:
        return None, None
    if format_of(scheme) is not PANEL:
        return None, f"dynamic: {scheme} has no kernel with static activations"
    n, k = weight.meta["val"].shape
    found = config.calibration.find(site.name, str(scheme), (int(n), int(k)))
    return (None, found) if isinstance(found, str) else (found, None)


def _decide_other(node: fx.Node, sites: tuple[Site, ...], config: FxQuantConfig, isa: str) -> Verdict | None:
    """The verdict on a node that is no linear; None where its kind has no kernel of ours."""
    fusion = FUSIONS.get(kind_of(node) or "")
    if fusion is None:
        return None
    try:
        return fusion.decide(node, {site.kind: setting_for(site, config) for site in sites}, config, isa)
    except Exception as error:  # nothing that a decider does may cost the user more than this site
        return Verdict(f"it cannot be judged: {type(error).__name__}: {error}")


def _other_decision(site: Site, verdict: Verdict | None) -> Decision:
    if verdict is None:
        return Decision(site, reason=FLOAT_KINDS[site.kind])
    return Decision(site, verdict.schemes.get(site.kind), verdict.reason, verdict.kernel, verdict.error_class)


def float_plan(gm: fx.GraphModule, reason: str) -> Planned:
    """The plan that leaves every site of a recognised graph float for one reason; no weight is looked at."""
    found = [(node, site) for node, sites in find_sites(gm.graph).items() for site in sites]
    plan = Plan(tuple(Decision(site, reason=reason) for _, site in found))
    return Planned(plan, {site.name: node for node, site in found}, {}, {})


@dataclass(frozen=True)
class Packer:
    """Packs a weight, or says why it cannot be: not finite, or (``guarded``) rounded too coarsely.

    With ``static`` activations it is the weight times their steps that is packed.
    """

    guarded: bool
    dry_run: bool = False
    static: StaticQParams | None = None

    def __call__(self, weight: Tensor, scheme: Scheme) -> Packed:
        """The packed weight of shape [out_features, in_features] or a reason."""
        if self.static is not None:
            weight = weight.to(torch.float32) * self.static.steps
        try:
            rounded = round_weight(weight, scheme)
        except PackError as problem:
            return Packed(None, reason=str(problem))
        error = weight_error(weight, rounded)
        if self.guarded and error.worst_db < MIN_WEIGHT_SQNR_DB:
            return Packed(
                None,
                sqnr_db=error.overall_db,
                reason=f"auto: rounding the weight costs too much in its worst channel ({error.worst_db:.1f} dB "
                f"SQNR, {MIN_WEIGHT_SQNR_DB:.0f} dB wanted); an explicit scheme overrides this",
            )
        return Packed(None if self.dry_run else pack_codes(rounded, scheme), sqnr_db=error.overall_db)


def _verdict(node: fx.Node, site: Site, config: FxQuantConfig, isa: str) -> Scheme | str:
    """The scheme that the options and the operands allow, or the sentence why the site stays float."""
    x, weight = node.args[0], node.args[1]
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
        return "an operand is no tensor of the graph"
    setting = setting_for(site, config)
    if setting == "float":
        return "the options ask for float"
    for sentence, holds in conditions(x, weight):
        if not holds:
            return sentence
    scheme = resolve_scheme(setting, isa)
    return scheme if setting != "auto" or isinstance(scheme, str) else _guarded(scheme, node, isa)


def _guarded(scheme: Scheme, node: fx.Node, isa: str) -> Scheme | str:
    """``auto``'s scheme where it is faster than float, else the sentence with both times."""
    timing = site_timing(node, str(scheme), isa)
    if timing is not None and not timing.is_gain:
        return (
            f"auto: float is as fast: {timing.float_us:.0f} us, and {timing.scheme_us:.0f} us as {scheme}, "
            f"by the measured table of {isa}"
        )
    size = node.args[1].meta["val"].numel()  # type: ignore[union-attr]
    if timing is None and size < MIN_WEIGHTS:
        return f"auto: {size} weights are too few to win over float (fewer than {MIN_WEIGHTS})"
    return scheme


def site_timing(node: fx.Node, scheme: str, isa: str) -> Timing | None:
    """What the measured table promises for a linear at the sizes of the call that is compiled; None where it has none."""
    x, weight = node.args[0].meta["val"], node.args[1].meta["val"]  # type: ignore[union-attr]
    rows = [size_hint(size) for size in x.shape[:-1]]
    if None in rows:
        return None
    n, k = weight.shape
    return linear_timing(isa, scheme, math.prod(size for size in rows if size is not None), k, n)
