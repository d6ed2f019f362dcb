"""The instruction set that kernels use: what the CPU has, lowered by FXQUANT_ISA where that is set."""

import torch

from fxquant.config import ISAS, environment

# What each level needs from torch.cpu.get_capabilities(), lowest level first.
_NEEDS = {
    "scalar": (),
    "avx2": ("avx2", "fma3"),
    "avx_vnni": ("avx2", "fma3", "avx_vnni"),
    "avx512_vnni": ("avx2", "fma3", "avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_vnni"),
}


def available_isas() -> tuple[str, ...]:
    """Every level that this CPU can run, lowest first."""
    has = torch.cpu.get_capabilities()
    return tuple(isa for isa in ISAS if all(has.get(feature, False) for feature in _NEEDS[isa]))


def current_isa() -> str:
    """The level in force: the highest available one not above FXQUANT_ISA."""
    limit = environment().isa
    allowed = ISAS if limit is None else ISAS[: limit + 1]
    return [isa for isa in available_isas() if isa in allowed][-1]
