"""Number formats, one family a file: what a code is, which value it stands for, how a tensor is coded."""

from fxquant.formats.base import Format, QParams, Table
from fxquant.formats.uniform import Uniform

FAMILIES: dict[str, type[Format]] = {family.__name__: family for family in (Uniform,)}  # by the name that files carry

__all__ = ["FAMILIES", "Format", "QParams", "Table", "Uniform"]
