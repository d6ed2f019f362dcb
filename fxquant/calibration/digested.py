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
        return content_digest(repr(self.about()), self.tensors())

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and isinstance(other, Digested) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)


def content_digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a text and of tensors by name: shape, dtype and bytes."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
