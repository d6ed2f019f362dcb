"""What a recipe sees while batches run: observers at the input of every linear, a sampler at every attention."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from fxquant.calibration.checkpoint import States
from fxquant.calibration.observers import InputExtents, refuse_not_finite
from fxquant.calibration.recipes import Gathered, Recipe
from fxquant.calibration.recipes.attention_samples import AttentionSampler
from fxquant.calibration.recipes.base import OBSERVERS
from fxquant.calibration.study import Study
from fxquant.schemes import Scheme

_ATTENTION = "attention/"


class Watching:
    """Watches a study with the observers of a recipe at every linear that has an integer scheme, and perhaps at attention.

    With ``holds`` the inputs of a batch are kept until ``take``, so that a batch that fails half-way counts as none. ``states``
    are what is gone on from.
    """

    def __init__(self, study: Study, recipe: Recipe, seed: int, states: States, *, holds: bool, attention: bool) -> None:
        self._study, self._recipe, self._seed, self._states, self._holds = study, recipe, seed, states, holds
        self._held: list[Callable[[], None]] = []
        self.gathered: dict[str, Gathered] = {}
        self.samplers: dict[str, AttentionSampler] = {}
        self.is_on = True
        study.watch = self._linear
        study.watch_attention = self._attention if attention else None

    def take(self) -> None:
        """Observe what is held."""
        for observe in self._held:
            observe()
        self._held.clear()

    @property
    def is_empty(self) -> bool:
        """Whether nothing was observed."""
        return not self.gathered and not self.samplers

    @property
    def knows_all(self) -> bool:
        """Whether every linear of the states that it goes on from has been met."""
        return {name for name in self._states if not name.startswith(_ATTENTION)} <= self._study.sites.keys()

    def complete(self) -> None:
        """Everything that was seen, before a stop and after it, is in ``gathered`` and ``samplers``; watches no more."""
        for name in self._states.keys() & self._study.sites.keys():
            self._at(name)
        for name in self._states:
            if name.startswith(_ATTENTION):
                self._sampler(name.removeprefix(_ATTENTION))
        self._study.watch = self._study.watch_attention = None

    def states(self) -> States:
        """What a checkpoint keeps."""
        linears = {name: each.states() for name, each in self.gathered.items()}
        attention = {f"{_ATTENTION}{path}": each.states() for path, each in self.samplers.items()}
        return {**self._states, **linears, **attention}

    def _linear(self, name: str, x: Tensor) -> None:
        if not self.is_on or not isinstance(self._study.sites[name].scheme, Scheme) or not x.numel():
            return
        if self._holds:
            refuse_not_finite(name, x)  # now, while it is known which batch it is
            self._held.append(partial(self._observe, name, x.clone()))
        else:
            self._observe(name, x)

    def _observe(self, name: str, x: Tensor) -> None:
        self._at(name).observe(x)

    def _attention(self, path: str, args: Mapping[str, Any]) -> None:
        if not self.is_on or args["q"].dim() != 4 or not args["q"].numel():
            return
        if self._holds:
            kept = {name: value.clone() if isinstance(value, Tensor) else value for name, value in args.items()}
            self._held.append(partial(self._sample, path, kept))
        else:
            self._sample(path, args)

    def _sample(self, path: str, args: Mapping[str, Any]) -> None:
        self._sampler(path).observe(args)

    def _at(self, name: str) -> Gathered:
        if name not in self.gathered:
            self._study.sites[name].refuse_not_finite()
            more = {key: OBSERVERS[key](name, self._seed) for key in self._recipe.observes}
            self.gathered[name] = Gathered(self._study.sites[name], InputExtents(name), more)
            if name in self._states:
                self.gathered[name].restore(self._states[name])
        return self.gathered[name]

    def _sampler(self, path: str) -> AttentionSampler:
        if path not in self.samplers:
            self.samplers[path] = AttentionSampler(path, seed=self._seed)
            if _ATTENTION + path in self._states:
                self.samplers[path].restore(self._states[_ATTENTION + path])
        return self.samplers[path]
