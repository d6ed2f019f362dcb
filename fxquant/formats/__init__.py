"""Number formats, one family a file: what a code is, which value it stands for, how a tensor is coded."""

from fxquant.formats.base import Format, QParams, Table
from fxquant.formats.uniform import Uniform

__all__ = ["Format", "QParams", "Table", "Uniform"]
