"""What a recipe sees while batches run: an observer or more at the input of every linear, a sampler at every attention."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fxquant.calibration.checkpoint import States
from fxquant.calibration.observer import MinMaxObserver
from fxquant.calibration.recipes import Gathered, Recipe
from fxquant.calibration.recipes.attention_samples import AttentionSampler
from fxquant.calibration.recipes.base import OBSERVERS
from fxquant.calibration.study import Study
from fxquant.schemes import Scheme

_ATTENTION = "attention/"


@dataclass
class Watching:
    """``gathered`` by site name, ``samplers`` by the path of an attention; ``restored`` are states that both go on from.

    ``is_observing`` False: sites are met, and nothing is observed. ``attention``: whether attention is sampled.
    """

    study: Study
    recipe: Recipe
    seed: int
    attention: bool
    restored: States
    gathered: dict[str, Gathered] = field(default_factory=dict)
    samplers: dict[str, AttentionSampler] = field(default_factory=dict)
    is_observing: bool = True

    def start(self) -> None:
        """Watch the study."""
        self.study.watch = self._linear
        self.study.watch_attention = self._attention if self.attention else None

    def stop(self) -> None:
        """Watch no more."""
        self.study.watch = self.study.watch_attention = None

    def states(self) -> States:
        """What a checkpoint keeps."""
        linears = {name: each.states() for name, each in self.gathered.items()}
        return linears | {f"{_ATTENTION}{path}": each.states() for path, each in self.samplers.items()}

    @property
    def is_empty(self) -> bool:
        """Whether no site was met."""
        return not self.gathered and not self.samplers

    def _linear(self, name: str, x: Tensor) -> None:
        if not isinstance(self.study.sites[name].scheme, Scheme) or not x.numel():
            return
        if name not in self.gathered:
            more = {key: OBSERVERS[key](name, self.seed) for key in self.recipe.observes}
            self.gathered[name] = Gathered(self.study.sites[name], MinMaxObserver(name), more)
            if name in self.restored:
                self.gathered[name].restore(self.restored[name])
        if self.is_observing:
            self.gathered[name].observe(x)

    def _attention(self, path: str, args: Mapping[str, Any]) -> None:
        if args["q"].dim() != 4 or not args["q"].numel():
            return
        if path not in self.samplers:
            self.samplers[path] = AttentionSampler(path, seed=self.seed)
            if _ATTENTION + path in self.restored:
                self.samplers[path].restore(self.restored[_ATTENTION + path])
        if self.is_observing:
            self.samplers[path].observe(args)
