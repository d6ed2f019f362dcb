"""What every observer is: two pure functions, one that sums up a batch and one that joins two summaries.

The state of an observer is a dict of tensors whose size does not depend on the amount of data. ``observe`` joins the batch's
summary to it, ``merge`` that of another observer (data that came later), ``state`` and ``restore`` stop and resume. All of it
is deterministic on the CPU, where data of other devices are brought.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fxquant.errors import CalibrationError
from fxquant.granularity import Granularity, PerGroup, PerTensor, PerToken

State = dict[str, Tensor]
# Values worked on at once: 4 MB of float32, so that temporaries stay small.
CHUNK = 1 << 20


class Observer(ABC):
    """Streaming statistics of one tensor of a model; ``site`` names it in errors."""

    def __init__(self, site: str) -> None:
        self.site = site
        self._state: State = {}

    @property
    @abstractmethod
    def settings(self) -> tuple[float, ...]:
        """Numbers that two observers share if their states can be joined."""

    @abstractmethod
    def _summarize(self, x: Tensor) -> State:
        """The state after the one batch x, float32 and finite; ``self._state`` may be read for a running index."""

    @abstractmethod
    def _join(self, first: State, second: State) -> State:
        """The state after both; may write into ``first``, never into ``second``."""

    @property
    def is_empty(self) -> bool:
        """Whether no data have been seen."""
        return not self._state

    def observe(self, x: Tensor) -> None:
        """Take a batch into account.

        Raises:
            CalibrationError: the batch is empty, not floating point, not finite or of another shape than those before.
        """
        x = self._checked(x.detach())
        batch = self._summarize(x)
        self._state = self._join_checked(self._state, batch) if self._state else batch

    def merge(self, other: "Observer") -> None:
        """Take what another observer of the same kind and settings has seen into account, as if it had come later.

        Raises:
            CalibrationError: kind, settings or shapes differ.
        """
        if type(other) is not type(self) or other.settings != self.settings:
            raise CalibrationError(f"{self.site}: {self._label()} cannot take in {other._label()}")
        if not other._state:
            return
        theirs = other.state()
        theirs.pop("settings")
        self._state = self._join_checked(self._state, theirs) if self._state else theirs

    def state(self) -> State:
        """A copy of everything that was seen, with the settings; restore it into an observer made with the same ones."""
        settings = torch.tensor(self.settings, dtype=torch.float64)
        return {"settings": settings, **{name: value.clone() for name, value in self._state.items()}}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state.

        Raises:
            CalibrationError: the state is of other settings.
        """
        settings = tuple(state["settings"].tolist()) if "settings" in state else None
        if settings != self.settings:
            raise CalibrationError(f"{self.site}: the state is of settings {settings}, not of {self._label()}")
        self._state = {name: value.clone() for name, value in state.items() if name != "settings"}

    def _seen(self) -> State:
        """The state, once there are data."""
        if not self._state:
            raise CalibrationError(f"{self.site}: no data were seen; run at least one batch that reaches it")
        return self._state

    def _checked(self, x: Tensor) -> Tensor:
        if not x.numel():
            raise CalibrationError(f"{self.site}: a batch of shape {tuple(x.shape)} is empty; leave such batches out")
        if not x.is_floating_point():
            raise CalibrationError(f"{self.site}: values are {x.dtype}; only floating-point tensors are observed")
        wide = x.to("cpu", torch.float32)
        bad = int((~torch.isfinite(wide)).sum())
        if bad:
            raise CalibrationError(f"{self.site}: {bad} of {x.numel()} values of a batch are not finite")
        return wide

    def _join_checked(self, first: State, second: State) -> State:
        for name, value in first.items():
            if self._is_fixed(name) and value.shape != second[name].shape:
                shapes = f"{tuple(value.shape)}, then {tuple(second[name].shape)}"
                raise CalibrationError(f"{self.site}: batches differ in shape ({name} is {shapes})")
        return self._join(first, second)

    def _is_fixed(self, name: str) -> bool:
        """Whether a tensor of the state has the same shape after every batch."""
        return True

    def _label(self) -> str:
        return f"{type(self).__name__}{self.settings}"


class BlockObserver(Observer):
    """An observer of the blocks of a granularity, [blocks, n] with a fixed number of blocks."""

    def __init__(self, site: str, granularity: Granularity | None = None) -> None:
        super().__init__(site)
        self.granularity = granularity or PerTensor()
        if isinstance(self.granularity, PerToken):
            way = "use TokenExtents, or PerChannel(-2) for positions of a fixed length"
            raise CalibrationError(f"{site}: tokens are as many as the data, so they have no static qparams; {way}")

    @abstractmethod
    def _summarize_blocks(self, blocks: Tensor) -> State:
        """The state after blocks [B, n]."""

    def _summarize(self, x: Tensor) -> State:
        first, *rest = self._parts(stream_blocks(self.site, x, self.granularity))
        state = self._summarize_blocks(first)
        for part in rest:
            state = self._join(state, self._summarize_blocks(part))
        return state

    @property
    def _state_size(self) -> int:
        """About how many numbers the state has for a block."""
        return 1

    def _parts(self, blocks: Tensor) -> Sequence[Tensor]:
        """The blocks in parts of ``CHUNK`` values, or as many as the state has numbers: so that temporaries stay small."""
        parts: tuple[Tensor, ...] = blocks.split(max(CHUNK // len(blocks), self._state_size), dim=1)
        return parts


def stream_blocks(site: str, x: Tensor, granularity: Granularity) -> Tensor:
    """x as [blocks, n] where the number of blocks depends on the site alone: a group of channels is one block for all rows.

    Raises:
        CalibrationError: the group size does not divide the number of channels.
    """
    if not isinstance(granularity, PerGroup):
        return granularity.blocks(x)
    size, width = granularity.size, x.shape[-1]
    if width % size:
        raise CalibrationError(f"{site}: group size {size} does not divide {width} channels")
    return x.reshape(-1, width // size, size).transpose(0, 1).reshape(width // size, -1)


def refuse_flat(site: str, low: Tensor, high: Tensor) -> None:
    """Refuse blocks whose values are all equal: [B, 1] each.

    Raises:
        CalibrationError: naming the first such block.
    """
    flat = (low == high).reshape(-1).nonzero()
    if len(flat):
        block = int(flat[0])
        value = float(low.reshape(-1)[block])
        raise CalibrationError(f"{site}: all values of block {block} are {value:g}, a range of zero; leave the site in float")
