"""The split 2^-k of twin uniform softmax codes and the ratio 2^m of the steps of twin uniform GELU codes (PTQ4ViT).

k = 0 .. 19; m = -5 .. 24 as in AdaLog's re-implementation, where PTQ4ViT's own code searches the positive step on a linear
grid against its paper. The metric is usually the layer's output, ``product.Product.metric``. vit-quantizers section 4.
"""

from fxquant.calibration.searches.metric import Candidates, Choice, Metric, choose
from fxquant.calibration.searches.scan import whole_numbers
from fxquant.formats.twin_uniform import RATIOS, SPLITS, TwinGelu, TwinSoftmax


def twin_split(metric: Metric, format: TwinSoftmax, blocks: int, splits: range = SPLITS) -> Choice:
    """k of every block; ties keep the first."""
    return choose(metric, [Candidates(format, {"split": whole_numbers(splits, blocks)})])


def twin_ratio(metric: Metric, format: TwinGelu, blocks: int, ratios: range = RATIOS) -> Choice:
    """m of every block; ties keep the first."""
    return choose(metric, [Candidates(format, {"ratio": whole_numbers(ratios, blocks)})])
