"""Schemes: how the operands of a linear are coded. The grammar is ``w<weight bits>a<activation bits>[-g<group size>]``.

Weights are symmetric, ±(2^(w-1) - 1), with one scale an output channel, or (``-g``) one a group of neighbouring input
features, the last of which may be shorter. Activations are affine, 0 .. 2^a - 1, per token and dynamic, or static per input
channel where a calibration gives the ranges; ``a16`` leaves them in the model's float type.

| bits | weight code | activation code |
|---|---|---|
| 2 | -1 .. 1 | |
| 4 | -7 .. 7 | 0 .. 15 |
| 5 | -15 .. 15 | 0 .. 31 |
| 6 | -31 .. 31 | 0 .. 63 |
| 7 | -63 .. 63 | 0 .. 127 |
| 8 | -127 .. 127 | 0 .. 255 |

Every width from 4 to 8 bits on either side has panel kernels; on every instruction set they compute the same exact integer
sums. What differs is the way there:

| sum of bits | schemes | how AVX2 keeps the sums exact | k steps of 4 proven safe for any weight |
|---|---|---|---|
| 16 | w8a8 | 16-bit products in 32-bit sums (vpmaddwd) | any number |
| 15 | w8a7, w7a8 | 8-bit products in centred 16-bit sums, widened by a proven schedule | 2 |
| 14 | w7a7, w8a6, w6a8 | the same | 4 |
| 13 | w8a5, w7a6, w6a7, w5a8 | the same | 8 |
| 12 | w6a6, w4a8, w5a7, w7a5, w8a4 | the same | 16 to 18 |
| 8 to 11 | w4a4 and the others | the same | 34 to 312 |

The schedule is made from the actual weights, so real segments are a few times as long as those of the last column. With
VNNI (vpdpbusd) and in the scalar kernels every scheme is summed in 32 bits directly.

| schemes | kernels |
|---|---|
| w2a4, w2a6 | exact sums by table look-up |
| w8a16, w4a16, w2a16, each with or without groups; w4a8 with groups | weights read as one stream, for few rows at a time |

Any other widths of 2 to 8 bits, any other group size and an input that a calibration codes in a number format have no kernel:
the specification runs in float, compiled, and the report says so. Schemes by number formats are those of
``fxquant.format_schemes``; weights of 4-bit tables are read by the kernel of streamed weights, all others run as their
specification too.

``auto`` lets fxquant pick per site and instruction set; ``float`` leaves a site as it is.

Attention has schemes of its own, which nothing but an option or a pattern asks for (``reference.attention`` has formulas):

| scheme | q and centred k, per token | weights and v |
|---|---|---|
| qk8 | -127 .. 127 | float |
| qk6 | -31 .. 31; on AVX2 in 16-bit sums that are exact for any input | float |
| qk8-pv8, qk6-pv8 | the same | 0 .. 255 a weight, -127 .. 127 per channel of v |
"""

import difflib
import re
from dataclasses import dataclass

from fxquant.errors import ConfigError
from fxquant.format_schemes import FORMAT_SCHEMES, FormatScheme

WIDTHS = range(4, 9)  # bits of weights and of activations that the panel kernels know
BITS = range(2, 9)  # bits of weights and of activations that have a meaning, with a kernel or without
FLOAT_BITS = 16  # ``a16``: activations stay in the model's float type
GROUPS = (16, 32, 64, 128, 256)  # whole steps of every streamed format; sums of a group's codes fit 16 bits
_GRAMMAR = re.compile(r"w(\d{1,2})a(\d{1,2})(?:-g(\d{1,9}))?")


@dataclass(frozen=True)
class AttentionScheme:
    """Code widths of attention: of q and k, and of weights and v (0: they stay float)."""

    qk_bits: int
    pv_bits: int

    @property
    def names(self) -> dict[str, str]:
        """What each site of attention that is quantized is called."""
        qk = {"attention.qk": f"qk{self.qk_bits}"}
        return qk | {"attention.pv": f"pv{self.pv_bits}"} if self.pv_bits else qk


@dataclass(frozen=True)
class Scheme:
    """Code widths of a linear site: symmetric weights per channel or group, affine activations per token.

    ``group`` is the number of input features that share a scale (0: all of an output channel); ``act_bits`` 16 is float.
    ``coding`` names the number format in which a calibration codes the input instead.
    """

    weight_bits: int
    act_bits: int
    group: int = 0
    static: bool = False
    coding: str | None = None

    def __str__(self) -> str:
        name = f"w{self.weight_bits}a{self.act_bits}" + (f"-g{self.group}" if self.group else "")
        return " ".join([name, *(["static"] if self.static else []), *([self.coding] if self.coding else [])])

    @property
    def is_weight_only(self) -> bool:
        return self.act_bits == FLOAT_BITS


LinearScheme = Scheme | FormatScheme
PANEL_SCHEMES = {str(scheme): scheme for scheme in (Scheme(w, a) for w in reversed(WIDTHS) for a in reversed(WIDTHS))}
LUT_SCHEMES = {str(scheme): scheme for scheme in (Scheme(2, 6), Scheme(2, 4))}
WEIGHT_ONLY_SCHEMES = {str(scheme): scheme for scheme in (Scheme(8, 16), Scheme(4, 16), Scheme(2, 16))}
SCHEMES = PANEL_SCHEMES | LUT_SCHEMES | WEIGHT_ONLY_SCHEMES  # without groups
GROUPED = (*WEIGHT_ONLY_SCHEMES, "w4a8")  # what may have ``-g<size>``
ATTENTION_SCHEMES = {
    "qk8": AttentionScheme(8, 0),
    "qk6": AttentionScheme(6, 0),
    "qk8-pv8": AttentionScheme(8, 8),
    "qk6-pv8": AttentionScheme(6, 8),
}
CALIBRATED = "calibrated"
ATTENTION_SETTINGS = ("auto", "off", CALIBRATED, *ATTENTION_SCHEMES)  # of the option ``attention``
SETTINGS = ("auto", "float", *SCHEMES, *FORMAT_SCHEMES, *ATTENTION_SCHEMES)  # of a pattern of ``sites``


def parse_scheme(name: str) -> LinearScheme:
    """The scheme of a name such as ``w8a7``, ``w4a16-g64`` or ``mxfp4``.

    Raises:
        ConfigError: the name does not follow the grammar, or the widths or the group size mean nothing.
    """
    return FORMAT_SCHEMES[name] if name in FORMAT_SCHEMES else parse_integer_scheme(name)


def parse_integer_scheme(name: str) -> Scheme:
    """The scheme of a name by the grammar of widths; raises as ``parse_scheme`` does."""
    match = _GRAMMAR.fullmatch(name)
    if match is None:
        raise ConfigError(f"unknown scheme {name!r}; {_hint(name)}")
    scheme = Scheme(int(match[1]), int(match[2]), int(match[3] or 0))
    if scheme.weight_bits not in BITS or scheme.act_bits not in (*BITS, FLOAT_BITS):
        raise ConfigError(
            f"unknown scheme {name!r}: weights have 2 to 8 bits and activations 2 to 8, or 16 for float; "
            f"the nearest is '{_nearest(scheme)}'"
        )
    if match[3] is not None and scheme.group < 2:
        raise ConfigError(f"scheme {name!r}: a group has at least 2 weights; kernels know {', '.join(map(str, GROUPS))}")
    return scheme


def check_setting(name: str) -> str:
    """``name`` if it is the scheme of a linear, ``auto`` or ``float``.

    Raises:
        ConfigError: it is none of them.
    """
    return name if name in ("auto", "float") else str(parse_scheme(name))


def check_site_setting(name: str) -> str:
    """``name`` if it is the scheme of a linear or of attention, ``auto`` or ``float``.

    Raises:
        ConfigError: it is none of them.
    """
    return name if name in ATTENTION_SCHEMES else check_setting(name)


def check_attention(name: str) -> str:
    """``name`` if it is a setting of the option ``attention``.

    Raises:
        ConfigError: it is none.
    """
    if name not in ATTENTION_SETTINGS:
        raise ConfigError(f"unknown attention {name!r}; use one of {', '.join(ATTENTION_SETTINGS)}")
    return name


def choose_scheme(isa: str) -> Scheme | None:
    """What ``auto`` means on an instruction set: the fastest exact scheme there, or None where float is faster."""
    return {"avx2": SCHEMES["w8a7"], "avx_vnni": SCHEMES["w8a8"], "avx512_vnni": SCHEMES["w8a8"]}.get(isa)


def _nearest(scheme: Scheme) -> Scheme:
    def distance(other: Scheme) -> int:
        return abs(other.weight_bits - scheme.weight_bits) + abs(other.act_bits - scheme.act_bits)

    return min(SCHEMES.values(), key=distance)


def _hint(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), SETTINGS, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return (
        "known: auto, float and w<bits>a<bits>[-g<size>], such as w8a8, w6a6 or w4a16-g64; "
        f"for attention {', '.join(ATTENTION_SCHEMES)}"
    )
