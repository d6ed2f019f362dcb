"""The plan stage: every candidate site gets a scheme with a packed weight, or a reason why it stays float."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from fxquant.binding import Packed, Slot, frozen_value
from fxquant.config import FxQuantConfig
from fxquant.errors import PackError
from fxquant.lowering.formats import format_of
from fxquant.lowering.pack import weight_error
from fxquant.passes.quantize.linear import conditions
from fxquant.plan import FLOAT_KINDS, Decision, Plan, resolve_scheme, setting_for
from fxquant.schemes import Scheme
from fxquant.sites import Site, find_sites

# auto leaves a linear float when rounding its weights alone costs more than this in its worst output channel: 20 dB is
# an error of a tenth, where a user would notice. An explicit scheme has no such guard.
MIN_WEIGHT_SQNR_DB = 20.0
# auto leaves a linear float below this many weights: for 16 to 128 rows, quantizing them then costs as much as the
# integer product saves (measured on AVX2 and AVX512-VNNI; 128 x 128 wins from about 64 rows on).
MIN_WEIGHTS = 32768


@dataclass(frozen=True)
class Planned:
    """A plan with what the later stages need: node of each site, slot and packed weight of each taken site."""

    plan: Plan
    nodes: Mapping[str, fx.Node]
    slots: Mapping[str, Slot]
    packed: Mapping[str, Packed]

    def without_contents(self) -> "Planned":
        """The same plan, holding no packed weight."""
        return replace(self, packed={site: packed.without_contents() for site, packed in self.packed.items()})

    def without(self, reasons: Mapping[str, str]) -> "Planned":
        """The same plan with some packed weights left float: reasons by the slot's site hold for all its sites."""
        lost = {site: reasons[slot.site] for site, slot in self.slots.items() if slot.site in reasons}
        slots = {site: slot for site, slot in self.slots.items() if site not in lost}
        return Planned(self.plan.refuse(lost), self.nodes, slots, self.packed)


def make_plan(gm: fx.GraphModule, config: FxQuantConfig, isa: str, args: Sequence[Any], dry_run: bool) -> Planned:
    """Decide every candidate site of a recognised graph. ``dry_run`` looks at weights but packs nothing."""
    decisions: list[Decision] = []
    nodes: dict[str, fx.Node] = {}
    slots: dict[str, Slot] = {}
    packed: dict[str, Packed] = {}
    known: dict[tuple[fx.Node, Scheme], Slot] = {}
    for node, sites in find_sites(gm.graph).items():
        for site in sites:
            nodes[site.name] = node
            if site.kind != "linear":
                decisions.append(Decision(site, reason=FLOAT_KINDS[site.kind]))
                continue
            verdict = _verdict(node, site, config, isa)
            if isinstance(verdict, str):
                decisions.append(Decision(site, reason=verdict))
                continue
            weight = node.args[1]
            assert isinstance(weight, fx.Node)
            slot = known.get((weight, verdict))
            if slot is None:
                guarded = setting_for(site, config) == "auto"
                slot = Slot(site.name, frozen_value(weight), verdict, Packer(guarded, dry_run))
                known[weight, verdict] = slot
                packed[site.name] = slot.pack(slot.weight(args), verdict)
            result = packed[slot.site]
            if result.reason is not None:
                decisions.append(Decision(site, reason=result.reason))
            else:
                decisions.append(Decision(site, scheme=verdict))
                slots[site.name] = slot
    return Planned(Plan(tuple(decisions)), nodes, slots, packed)


@dataclass(frozen=True)
class Packer:
    """Packs a weight, or says why it cannot be: not finite, or (``guarded``) rounded too coarsely."""

    guarded: bool
    dry_run: bool = False

    def __call__(self, weight: Tensor, scheme: Scheme) -> Packed:
        """The packed weight of shape [out_features, in_features] or a reason."""
        try:
            rounded = format_of(scheme).round_weight(weight, scheme)
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
        return Packed(None if self.dry_run else format_of(scheme).pack(rounded, scheme), sqnr_db=error.overall_db)


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
    size = weight.meta["val"].numel()
    if setting == "auto" and size < MIN_WEIGHTS:
        return f"auto: {size} weights are too few to win over float (fewer than {MIN_WEIGHTS})"
    return resolve_scheme(setting, isa)
