"""Vectors that hold for one weight alone: each such site names the digest of its weight, as the operand ``source``.

A low rank is found from the data and the weight of one layer; layers that share a graph would share it. So it is used where
the weight is the very one that it was found with, and the graph runs without it elsewhere.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.binding import FrozenValue, frozen_value
from fxquant.calibration.files import Vectors
from fxquant.passes.reparam import APPROXIMATIONS

SOURCE = "source"
ANOTHER = "is left out: its vectors are of another weight, or do not say of which"


@dataclass(frozen=True)
class Owned:
    """The vectors that a graph takes, the sites (rule, name) of those that it does not, and the weights they belong to."""

    vectors: Vectors
    left_out: tuple[tuple[str, str], ...] = ()
    weights: tuple[tuple[FrozenValue, Tensor], ...] = ()

    def fits(self, args: Sequence[Any]) -> bool:
        """Whether the arguments of a call hold the weights that the vectors were found with."""
        return all(torch.equal(source_of(weight(args)), source) for weight, source in self.weights)


def source_of(weight: Tensor) -> Tensor:
    """SHA-256 of a weight's values as float32, uint8 [32]."""
    values = weight.detach().to(torch.float32).contiguous().numpy().tobytes()
    return torch.tensor(list(hashlib.sha256(values).digest()), dtype=torch.uint8)


def without_approximations(vectors: Vectors) -> Vectors:
    """The vectors of rules that keep the function whatever weights they meet."""
    return {name: by_site for name, by_site in vectors.items() if name not in APPROXIMATIONS}


def own_vectors(vectors: Vectors, sites: Mapping[str, fx.Node], args: Sequence[Any]) -> Owned:
    """The vectors for a graph whose sites stand at these nodes, and whose weights are these arguments."""
    found: dict[str, Mapping[str, Mapping[str, Tensor]]] = {**without_approximations(vectors)}
    left_out, weights = [], []
    for name in vectors.keys() & APPROXIMATIONS:
        taken = {}
        for site in vectors[name].keys() & sites.keys():
            operands, weight = dict(vectors[name][site]), sites[site].args[1]
            source = operands.pop(SOURCE, None)
            owner = frozen_value(weight) if isinstance(weight, fx.Node) and weight.meta.get("fxquant_frozen") else None
            if owner is None or source is None or not torch.equal(source_of(owner(args)), source):
                left_out.append((name, site))
            else:
                taken[site] = operands
                weights.append((owner, source))
        if taken:
            found[name] = taken
    return Owned(found, tuple(sorted(left_out)), tuple(weights))
