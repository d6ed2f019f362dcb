"""Streaming observers: statistics of one tensor of a model in memory that does not grow with the data."""

from fxquant.calibration.observers.balanced import BalancedGram
from fxquant.calibration.observers.base import BlockObserver, Observer
from fxquant.calibration.observers.ema import EmaExtent
from fxquant.calibration.observers.gram import Gram
from fxquant.calibration.observers.histogram import Histogram
from fxquant.calibration.observers.inputs import InputExtents, refuse_not_finite
from fxquant.calibration.observers.min_max import MinMax
from fxquant.calibration.observers.moments import Moments
from fxquant.calibration.observers.quantiles import QuantileSketch
from fxquant.calibration.observers.reservoir import Reservoir
from fxquant.calibration.observers.samples import Samples
from fxquant.calibration.observers.tokens import TokenExtents

__all__ = [
    "BalancedGram",
    "BlockObserver",
    "EmaExtent",
    "Gram",
    "Histogram",
    "InputExtents",
    "MinMax",
    "Moments",
    "Observer",
    "QuantileSketch",
    "Reservoir",
    "Samples",
    "TokenExtents",
    "refuse_not_finite",
]
