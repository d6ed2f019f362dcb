"""Running the CPU kernels of one instruction set, for tests that compare them."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

from fxquant.config import ISAS
from fxquant.lowering.cpu.build import library_path
from fxquant.lowering.isa import available_isas

LEVELS = [ISAS.index(isa) for isa in available_isas()]  # every level that this CPU runs, by its number


@contextmanager
def at_most(isa: int) -> Iterator[ctypes.CDLL]:
    """The library with kernels of one instruction set, then the former ones."""
    library = ctypes.CDLL(str(library_path()))
    before = library.fxquant_isa()
    assert library.fxquant_set_isa(isa) == isa
    try:
        yield library
    finally:
        library.fxquant_set_isa(before)
