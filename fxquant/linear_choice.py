"""What runs a linear: its scheme, our float kernel (``fxquant::linear_float``) or F.linear.

``auto`` takes the fastest by the measured table of the instruction set (``lowering/timings.py``). Where there is no table it
takes the scheme of a large weight and F.linear for a small one. An explicit setting is never overruled.
"""

import math
from dataclasses import dataclass

import torch
from torch import fx

from fxquant import ops
from fxquant._compat import size_hint
from fxquant.config import FxQuantConfig
from fxquant.lowering.timings import GAIN, Timing, linear_timing
from fxquant.passes.quantize.linear import conditions
from fxquant.plan import GATED, GATED_BITS, is_gated, resolve_scheme, setting_for
from fxquant.schemes import LinearScheme, Scheme
from fxquant.sites import Site

# Without a table of measured times auto leaves a linear float below this many weights: for 16 to 128 rows, quantizing
# them then costs as much as the integer product saves.
MIN_WEIGHTS = 32768
# The float kernel computes panels of 16 columns, and its packed weight stands beside the model's own.
MIN_FLOAT_COLUMNS = 16
MAX_FLOAT_BYTES = 16 << 20
# What a call pays for the packed weights of its graph, in microseconds: benchmarks/binding.py.
BINDING_US, BINDING_US_PER_WEIGHT = 2.0, 0.4
# Every step of a sum rounds by half an ulp: tests/lowering/test_linear_float.py.
FLOAT_TOLERANCE = "in our float kernel, sums in another order: within (K + 2) · 2⁻²⁴ of Σ|x·w| + |b|"


@dataclass(frozen=True)
class LinearChoice:
    """A scheme, or the sentence why there is none.

    ``is_auto``: the user left the choice to us. ``own_float``: our float kernel runs the linear if its scheme does not.
    ``note`` is what the report says about a scheme that is taken.
    """

    scheme: LinearScheme | None = None
    reason: str | None = None
    timing: Timing | None = None
    is_auto: bool = False
    own_float: bool = False
    note: str | None = None

    def gain_us(self, own_float: bool) -> float | None:
        """What our float kernel, or the scheme, saves a call against F.linear; None without a measured time."""
        if self.timing is None:
            return None
        spent = self.timing.own_float_us if own_float else self.timing.scheme_us
        return None if spent is None else self.timing.float_us - spent


def choose_linear(node: fx.Node, site: Site, config: FxQuantConfig, isa: str) -> LinearChoice:
    """What the options, the operands and the measured table allow."""
    x, weight = node.args[0], node.args[1]
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
        return LinearChoice(reason="an operand is no tensor of the graph")
    setting = setting_for(site, config)
    wish = "the options ask for float"
    if setting == "auto" and config.calibration is not None:
        setting = config.calibration.scheme_of(site.name) or setting
        wish = "the calibration's budget leaves it float"
    for sentence, holds in conditions(x, weight):
        if not holds:
            return LinearChoice(reason=wish if setting == "float" else sentence)
    scheme, candidate = (resolve_scheme(wanted, isa, x) for wanted in (setting, "auto" if setting == "float" else setting))
    timing = site_timing(node, None if isinstance(candidate, str) else str(candidate), isa)
    note = None if isinstance(scheme, str) else gated_note(scheme, setting, x)
    if setting != "auto":
        if isinstance(scheme, str):
            return LinearChoice(reason=wish, timing=timing)
        return LinearChoice(scheme, timing=timing, note=note)
    own_float = config.float_kernels == "auto" and timing is not None and float_kernel_wins(node, timing)
    reason = scheme if isinstance(scheme, str) else too_slow(scheme, timing, own_float, weight.meta["val"].numel(), isa)
    return LinearChoice(None if isinstance(scheme, str) or reason else scheme, reason, timing, True, own_float, note)


def gated_note(scheme: LinearScheme, setting: str, x: fx.Node) -> str | None:
    """What to say about the activations of a linear that reads a product of two of them."""
    if isinstance(scheme, Scheme) and scheme.act_bits < GATED_BITS and is_gated(x):
        return f"{GATED}: {GATED_BITS} bits keep more of it"
    return f"{GATED_BITS}-bit activations: {GATED}" if setting == "auto" and is_gated(x) else None


def too_slow(scheme: LinearScheme, timing: Timing | None, own_float: bool, weights: int, isa: str) -> str | None:
    """The sentence why ``auto`` does not take its scheme, with the times that decided; None where it takes it."""
    if timing is None or timing.scheme_us is None:
        few = f"auto: {weights} weights are too few to win over float (fewer than {MIN_WEIGHTS})"
        return few if weights < MIN_WEIGHTS else None
    others = [timing.float_us] + ([timing.own_float_us] if own_float and timing.own_float_us is not None else [])
    if timing.scheme_us <= GAIN * min(others):
        return None
    own = f" ({timing.own_float_us:.0f} us in our kernel)" if len(others) > 1 else ""
    return (
        f"auto: float is as fast: {timing.float_us:.0f} us{own}, and {timing.scheme_us:.0f} us as {scheme}, "
        f"by the measured table of {isa}"
    )


def float_kernel_wins(node: fx.Node, timing: Timing) -> bool:
    """Whether our float kernel can run a linear, and does so faster than F.linear with the threads of this process."""
    values = [arg.meta["val"] for arg in node.all_input_nodes] + [node.meta["val"]]
    n, k = node.args[1].meta["val"].shape  # type: ignore[union-attr]
    return (
        all(value.dtype == torch.float32 for value in values)
        and n >= MIN_FLOAT_COLUMNS
        and ops.packed_float_bytes(n, k) <= MAX_FLOAT_BYTES
        and timing.threads == torch.get_num_threads()
        and timing.own_float_us is not None
        and timing.own_float_us <= GAIN * timing.float_us
    )


def site_timing(node: fx.Node, scheme: str | None, isa: str) -> Timing | None:
    """What the measured table promises for a linear at the sizes of the call that is compiled; None where it has none."""
    rows = rows_hint(node)
    if rows is None:
        return None
    n, k = node.args[1].meta["val"].shape  # type: ignore[union-attr]
    return linear_timing(isa, scheme, rows, k, n)


def rows_hint(node: fx.Node) -> int | None:
    """The rows of a linear's input in the call that is compiled; None where a size is not known."""
    sizes = [size_hint(size) for size in node.args[0].meta["val"].shape[:-1]]  # type: ignore[union-attr]
    return None if None in sizes else math.prod(size for size in sizes if size is not None)


def not_worth_binding(gain_us: float, weights: int) -> str | None:
    """The sentence why a graph whose packed weights gain so little in all takes none of them; None where it takes them."""
    cost = BINDING_US + BINDING_US_PER_WEIGHT * weights
    if gain_us > cost:
        return None
    return (
        f"auto: the graph would gain {gain_us:.1f} us a call by the measured table, and looking after its packed weights "
        f"costs {cost:.1f} us"
    )
