"""What is equal where its digest is: results that hold tensors and stand in options, in keys and in sets."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


class Digested(ABC):
    """Tensors count by their bytes, everything else by its text. Subclasses are frozen dataclasses with ``eq=False``."""

    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors of it, by name."""

    @abstractmethod
    def about(self) -> Any:
        """Everything else, as JSON."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything in it."""
        digest = hashlib.sha256(repr(self.about()).encode())
        for name, tensor in sorted(self.tensors().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and isinstance(other, Digested) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)
