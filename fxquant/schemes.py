"""Schemes: how the operands of a site are coded. The grammar is ``w<weight bits>a<activation bits>``.

Weights are symmetric per output channel, ±(2^(w-1) - 1); activations are affine, 0 .. 2^a - 1, per token and dynamic.
Every width from 4 to 8 bits on either side has kernels, and on every instruction set they compute the same exact integer
sums. What differs is the way there:

| bits | weight code | activation code |
|---|---|---|
| 4 | -7 .. 7 | 0 .. 15 |
| 5 | -15 .. 15 | 0 .. 31 |
| 6 | -31 .. 31 | 0 .. 63 |
| 7 | -63 .. 63 | 0 .. 127 |
| 8 | -127 .. 127 | 0 .. 255 |

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

``auto`` lets fxquant pick per site and instruction set; ``float`` leaves a site as it is.
"""

import difflib
import re
from dataclasses import dataclass

from fxquant.errors import ConfigError

WIDTHS = range(4, 9)  # bits of weights and of activations that the kernels know
_GRAMMAR = re.compile(r"w(\d{1,2})a(\d{1,2})")


@dataclass(frozen=True)
class Scheme:
    """Integer code widths of a linear site: symmetric weights per channel, affine activations per token."""

    weight_bits: int
    act_bits: int

    def __str__(self) -> str:
        return f"w{self.weight_bits}a{self.act_bits}"


SCHEMES = {str(scheme): scheme for scheme in (Scheme(w, a) for w in reversed(WIDTHS) for a in reversed(WIDTHS))}
SETTINGS = ("auto", "float", *SCHEMES)


def parse_scheme(name: str) -> Scheme:
    """The scheme of a name such as ``w8a7``.

    Raises:
        ConfigError: the name does not follow the grammar, or no kernel has these widths.
    """
    if name in SCHEMES:
        return SCHEMES[name]
    match = _GRAMMAR.fullmatch(name)
    if match is None:
        raise ConfigError(f"unknown scheme {name!r}; {_hint(name)}")
    weight_bits, act_bits = int(match[1]), int(match[2])
    nearest = Scheme(_clip(weight_bits), _clip(act_bits))
    raise ConfigError(
        f"unknown scheme {name!r}: no kernel multiplies {weight_bits}-bit weights by {act_bits}-bit activations "
        f"({WIDTHS[0]} to {WIDTHS[-1]} bits each); the nearest is '{nearest}'"
    )


def check_setting(name: str) -> str:
    """``name`` if it is a scheme, ``auto`` or ``float``.

    Raises:
        ConfigError: it is none of them.
    """
    return name if name in ("auto", "float") else str(parse_scheme(name))


def choose_scheme(isa: str) -> Scheme | None:
    """What ``auto`` means on an instruction set: the fastest exact scheme there, or None where float is faster."""
    return {"avx2": SCHEMES["w8a7"], "avx_vnni": SCHEMES["w8a8"], "avx512_vnni": SCHEMES["w8a8"]}.get(isa)


def _clip(bits: int) -> int:
    return min(max(bits, WIDTHS[0]), WIDTHS[-1])


def _hint(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), SETTINGS, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: auto, float and w<bits>a<bits> with {WIDTHS[0]} to {WIDTHS[-1]} bits each, such as w8a8 or w6a6"
