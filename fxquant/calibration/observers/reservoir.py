"""A uniform sample, without replacement, of the items of a stream (rows, or whole matrices), in constant memory.

Every item has a priority, SplitMix64 of (seed, stream, index); those of the least priority are kept. So the sample depends
on the items' indices alone, not on the batches, and two reservoirs with one seed pick the same items: rows of an input, of an
output and of a gradient stay paired. SplitMix64: Steele, Lea, Flood, OOPSLA 2014.
"""

import torch
from torch import Tensor

from fxquant.calibration.observers.base import Observer, State
from fxquant.errors import CalibrationError


class Reservoir(Observer):
    """State: ``items`` float32 [≤ capacity, ...], their ``priority``, ``stream`` and ``index`` int64, and ``seen`` int64 [1].

    An item has the last ``item_dims`` axes of the tensor, the leading ones are the stream: 1 for rows of [..., K], 3 for
    [heads, tokens, width] of [batch, heads, tokens, width]. Observers that will be merged need different ``stream`` numbers.
    """

    def __init__(self, site: str, capacity: int, seed: int = 0, *, item_dims: int = 1, stream: int = 0) -> None:
        super().__init__(site)
        if capacity < 1 or item_dims < 1 or not 0 <= seed < 2**31 or not 0 <= stream < 2**31:
            raise CalibrationError(
                f"{site}: capacity {capacity} and item_dims {item_dims} are at least 1, seed in 0 .. 2^31 - 1"
            )
        self.capacity, self.seed, self.item_dims, self.stream = capacity, seed, item_dims, stream

    @property
    def settings(self) -> tuple[float, ...]:
        return (self.capacity, self.seed, self.item_dims)

    @property
    def items(self) -> Tensor:
        """The sample in the order of the stream, float32 [kept, ...]."""
        seen = self._seen()
        order = torch.argsort(seen["index"], stable=True)
        order = order[torch.argsort(seen["stream"][order], stable=True)]
        return seen["items"][order]

    @property
    def seen(self) -> int:
        """The number of items that passed."""
        return int(self._seen()["seen"])

    def _summarize(self, x: Tensor) -> State:
        if x.dim() < self.item_dims:
            raise CalibrationError(f"{self.site}: a tensor of shape {tuple(x.shape)} has no items of {self.item_dims} axes")
        items = x.reshape(-1, *x.shape[x.dim() - self.item_dims :])
        index = torch.arange(len(items)) + (self.seen if self._state else 0)
        stream = torch.full_like(index, self.stream)
        batch = {"items": items, "priority": _priority(self.seed, stream, index), "stream": stream, "index": index}
        return {**self._kept(batch), "seen": torch.tensor([len(items)])}

    def _join(self, first: State, second: State) -> State:
        if first["items"].shape[1:] != second["items"].shape[1:]:
            shapes = f"{tuple(first['items'].shape[1:])}, then {tuple(second['items'].shape[1:])}"
            raise CalibrationError(f"{self.site}: items differ in shape: {shapes}")
        both = {name: torch.cat([first[name], second[name]]) for name in ("items", "priority", "stream", "index")}
        if len(torch.stack([both["stream"], both["index"]]).unique(dim=1)[0]) < len(both["index"]):
            raise CalibrationError(f"{self.site}: two reservoirs of one stream number were merged; give each its own")
        return {**self._kept(both), "seen": first["seen"] + second["seen"]}

    def _kept(self, state: State) -> State:
        order = torch.argsort(state["priority"], stable=True)[: self.capacity]
        return {name: value[order].clone() for name, value in state.items()}

    def _is_fixed(self, name: str) -> bool:
        return name == "seen"


def _priority(seed: int, stream: Tensor, index: Tensor) -> Tensor:
    """Pseudo-random int64 of (seed, stream, index); the numbers are SplitMix64's."""
    start = _mixed(stream + (seed << 32)) + index * _signed(0x9E3779B97F4A7C15)
    return _mixed(start)


def _mixed(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    """A logical shift to the right."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
