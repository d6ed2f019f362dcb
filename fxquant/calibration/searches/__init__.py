"""Searches: from observed data to qparams, and where it is a choice to a format. One file a method."""

from fxquant.calibration.searches.adalog import adalog_base, adalog_scale_and_base
from fxquant.calibration.searches.fpcs import fpcs
from fxquant.calibration.searches.kl import kl
from fxquant.calibration.searches.llm_fp4 import llm_fp4
from fxquant.calibration.searches.metric import Candidates, Choice, GramMetric, Metric, TensorMetric, choose
from fxquant.calibration.searches.product import Product, alternate
from fxquant.calibration.searches.ranges import from_extent, min_max, mse_grid, mse_percentile, omse, percentile
from fxquant.calibration.searches.scale_grid import half_step_start, scale_grid
from fxquant.calibration.searches.scan import scan_formats, scan_qparam
from fxquant.calibration.searches.sulq import sulq_shift
from fxquant.calibration.searches.twin_uniform import twin_ratio, twin_split

__all__ = [
    "Candidates",
    "Choice",
    "GramMetric",
    "Metric",
    "Product",
    "TensorMetric",
    "adalog_base",
    "adalog_scale_and_base",
    "alternate",
    "choose",
    "fpcs",
    "from_extent",
    "half_step_start",
    "kl",
    "llm_fp4",
    "min_max",
    "mse_grid",
    "mse_percentile",
    "omse",
    "percentile",
    "scale_grid",
    "scan_formats",
    "scan_qparam",
    "sulq_shift",
    "twin_ratio",
    "twin_split",
]
