"""Schemes: how the operands of a site are coded. ``w<weight bits>a<activation bits>``.

| scheme | weight code, symmetric per output channel | activation code, affine per token, dynamic | sum of bits |
|---|---|---|---|
| w8a8 | -127 .. 127 | 0 .. 255 | 16: exact with VNNI, or through 16-bit products on AVX2 |
| w8a7 | -127 .. 127 | 0 .. 127 | 15: exact in 16-bit accumulators by a proven schedule |
| w7a7 | -63 .. 63 | 0 .. 127 | 14: the same with longer segments |
| w2a6 | -1 .. 1 | 0 .. 63 | 8: exact by table look-up |
| w2a4 | -1 .. 1 | 0 .. 15 | 6: the same, four look-ups to an addition in 16 bits |

``auto`` lets fxquant pick per site and instruction set; ``float`` leaves a site as it is.
"""

import difflib
from dataclasses import dataclass

from fxquant.errors import ConfigError


@dataclass(frozen=True)
class Scheme:
    """Integer code widths of a linear site: symmetric weights per channel, affine activations per token."""

    weight_bits: int
    act_bits: int

    def __str__(self) -> str:
        return f"w{self.weight_bits}a{self.act_bits}"


SCHEMES = {str(scheme): scheme for scheme in (Scheme(8, 8), Scheme(8, 7), Scheme(7, 7), Scheme(2, 6), Scheme(2, 4))}
SETTINGS = ("auto", "float", *SCHEMES)


def check_setting(name: str) -> str:
    """``name`` if it is a scheme, ``auto`` or ``float``.

    Raises:
        ConfigError: it is none of them.
    """
    if name not in SETTINGS:
        close = difflib.get_close_matches(name, SETTINGS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(SETTINGS)
        raise ConfigError(f"unknown scheme {name!r}; {hint}")
    return name


def choose_scheme(isa: str) -> Scheme | None:
    """What ``auto`` means on an instruction set: the fastest exact scheme there, or None where float is faster."""
    return {"avx2": SCHEMES["w8a7"], "avx_vnni": SCHEMES["w8a8"], "avx512_vnni": SCHEMES["w8a8"]}.get(isa)
