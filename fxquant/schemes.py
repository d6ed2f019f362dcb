"""Schemes: how the operands of a site are coded. ``w<weight bits>a<activation bits>[-g<group size>]``.

| scheme | weight code, symmetric per output channel | activation code, affine per token, dynamic | sum of bits |
|---|---|---|---|
| w8a8 | -127 .. 127 | 0 .. 255 | 16: exact with VNNI, or through 16-bit products on AVX2 |
| w8a7 | -127 .. 127 | 0 .. 127 | 15: exact in 16-bit accumulators by a proven schedule |
| w7a7 | -63 .. 63 | 0 .. 127 | 14: the same with longer segments |

Streamed schemes are for few rows at a time, where reading the weights sets the pace (``lowering/stream.py``). With
``-g<size>`` a weight has one scale a group of ``size`` neighbouring input features (the last group may be shorter), else
one an output channel. ``a16`` leaves activations in float.

| scheme | weight code | activation code |
|---|---|---|
| w8a16, w4a16, w2a16 | -127 .. 127, -7 .. 7, -1 .. 1 | none: float |
| w4a8 | -7 .. 7 | 0 .. 255, affine per token, dynamic |

``auto`` lets fxquant pick per site and instruction set; ``float`` leaves a site as it is.
"""

import difflib
import re
from dataclasses import dataclass

from fxquant.errors import ConfigError

FLOAT_BITS = 16  # ``a16``: activations stay in the model's float type
GROUPS = (16, 32, 64, 128, 256)  # whole steps of every streamed format; sums of a group's codes fit 16 bits
_GRAMMAR = re.compile(r"(w\d{1,2}a\d{1,2})(?:-g(\d{1,9}))?")


@dataclass(frozen=True)
class Scheme:
    """Code widths of a linear site: symmetric weights per channel or group, affine activations per token.

    ``group`` is the number of input features that share a scale (0: all of an output channel); ``act_bits`` 16 is float.
    """

    weight_bits: int
    act_bits: int
    group: int = 0

    def __str__(self) -> str:
        return f"w{self.weight_bits}a{self.act_bits}" + (f"-g{self.group}" if self.group else "")

    @property
    def is_streamed(self) -> bool:
        """Whether a decode kernel computes it."""
        return str(Scheme(self.weight_bits, self.act_bits)) in STREAMED

    @property
    def is_weight_only(self) -> bool:
        return self.act_bits == FLOAT_BITS


SCHEMES = {str(scheme): scheme for scheme in (Scheme(8, 8), Scheme(8, 7), Scheme(7, 7))}
STREAMED = {str(scheme): scheme for scheme in (Scheme(8, 16), Scheme(4, 16), Scheme(2, 16), Scheme(4, 8))}
SETTINGS = ("auto", "float", *SCHEMES, *STREAMED)


def parse_scheme(name: str) -> Scheme:
    """The scheme of a name such as ``w8a8`` or ``w4a16-g64``.

    Raises:
        ConfigError: the name does not follow the grammar, or no kernel has these widths or this group size.
    """
    match = _GRAMMAR.fullmatch(name)
    base = match[1] if match else name
    known = SCHEMES | STREAMED
    if match is None or base not in known:
        close = difflib.get_close_matches(base, SETTINGS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(SETTINGS)
        raise ConfigError(f"unknown scheme {name!r}; {hint}")
    if match[2] is None:
        return known[base]
    if base not in STREAMED:
        raise ConfigError(
            f"scheme {name!r}: {base} has one weight scale an output channel; groups go with {', '.join(STREAMED)}"
        )
    if int(match[2]) not in GROUPS:
        raise ConfigError(f"scheme {name!r}: no kernel has groups of {match[2]}; use {', '.join(map(str, GROUPS))}")
    return Scheme(known[base].weight_bits, known[base].act_bits, int(match[2]))


def check_setting(name: str) -> str:
    """``name`` if it is a scheme, ``auto`` or ``float``.

    Raises:
        ConfigError: it is none of them.
    """
    return name if name in ("auto", "float") else str(parse_scheme(name))


def choose_scheme(isa: str) -> Scheme | None:
    """What ``auto`` means on an instruction set: the fastest exact scheme there, or None where float is faster."""
    return {"avx2": SCHEMES["w8a7"], "avx_vnni": SCHEMES["w8a8"], "avx512_vnni": SCHEMES["w8a8"]}.get(isa)
