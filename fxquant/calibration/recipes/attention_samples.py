"""Samples of the operands of one attention while batches pass, in constant memory."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxquant.calibration.observers import Reservoir
from fxquant.calibration.recipes.attention import SeenAttention
from fxquant.errors import CalibrationError

LENGTHS = 4  # pairs of lengths, at most
CAPACITY = 8  # items [heads, rows, width]: enough for qparams, few enough for searches by the output


class AttentionSampler:
    """Keeps q, k, v and the mask of the same ``capacity`` items; ``observe`` takes what ``Study.watch_attention`` hears.

    Items of different lengths cannot be multiplied together: each pair of lengths has its own reservoirs, and that of the most
    items is what ``seen`` gives. Of more than ``LENGTHS`` pairs those of the fewest items are let go.
    """

    def __init__(self, path: str, capacity: int = CAPACITY, seed: int = 0) -> None:
        self._path, self._capacity, self._seed = path, capacity, seed
        self._reservoirs: dict[tuple[int, int], dict[str, Reservoir]] = {}
        self._how: dict[str, Any] = {}

    def observe(self, args: Mapping[str, Any]) -> None:
        """Take a batch into account: operands of scaled_dot_product_attention by name, of four axes.

        Raises:
            CalibrationError: there are other than four axes, or values that are not finite.
        """
        q, k = args["q"], args["k"]
        if q.dim() != 4:
            raise CalibrationError(f"{self._path}: codings of attention are chosen for four axes, not for {q.dim()}")
        self._how = {"is_causal": bool(args["is_causal"]), "scale": args["scale"]}
        operands = {name: args[name] for name in "qkv"}
        if args["mask"] is not None:
            operands["mask"] = _additive(args["mask"]).expand(len(q), -1, q.shape[2], k.shape[2])
        for name, x in operands.items():
            self._reservoir(q.shape[2], k.shape[2], name).observe(x)
        if len(self._reservoirs) > LENGTHS:
            others = [lengths for lengths in self._reservoirs if lengths != (q.shape[2], k.shape[2])]
            del self._reservoirs[min(others, key=lambda lengths: self._reservoirs[lengths]["q"].seen)]

    def states(self) -> dict[str, dict[str, Tensor]]:
        """What ``restore`` takes: reservoirs by both lengths and the operand, and how the softmax is made."""
        scale = math.nan if self._how.get("scale") is None else self._how["scale"]
        how = {"is_causal": torch.tensor(bool(self._how.get("is_causal"))), "scale": torch.tensor(scale, dtype=torch.float64)}
        return {
            f"{queries} {keys} {name}": reservoir.state()
            for (queries, keys), own in self._reservoirs.items()
            for name, reservoir in own.items()
        } | {"how": how}

    def restore(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on from states."""
        for key, state in states.items():
            if key == "how":
                scale = float(state["scale"])
                self._how = {"is_causal": bool(state["is_causal"]), "scale": None if math.isnan(scale) else scale}
                continue
            queries, keys, name = key.split()
            reservoir = self._reservoir(int(queries), int(keys), name)
            reservoir.restore(state)

    def _reservoir(self, queries: int, keys: int, name: str) -> Reservoir:
        own = self._reservoirs.setdefault((queries, keys), {})
        return own.setdefault(name, Reservoir(self._path, self._capacity, self._seed, item_dims=3))

    def seen(self) -> SeenAttention:
        """The samples.

        Raises:
            CalibrationError: there was no batch.
        """
        if not self._reservoirs:
            raise CalibrationError(f"{self._path}: no data were seen; run at least one batch that reaches it")
        most = max(self._reservoirs.values(), key=lambda own: own["q"].seen)
        items = {name: reservoir.items for name, reservoir in most.items()}
        return SeenAttention(self._path, items["q"], items["k"], items["v"], items.get("mask"), **self._how)


def _additive(mask: Tensor) -> Tensor:
    """A mask as finite float32 numbers of four axes that are added to the scores; p of a wholly hidden row is even."""
    least = torch.finfo(torch.float32).min
    added = torch.zeros(mask.shape).masked_fill(~mask, least) if mask.dtype == torch.bool else mask.clamp_min(least)
    return added.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
