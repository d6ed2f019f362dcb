"""Recipes by the name that ``fxquant.calibrate(method=...)`` takes."""

import difflib

from fxquant.calibration.recipes.base import Gathered, Recipe
from fxquant.calibration.recipes.floating import FPQ
from fxquant.calibration.recipes.llm import FIREQ, FLEXQ
from fxquant.calibration.recipes.ranges import EMA, KL, MINMAX, MSE, OMSE, PERCENTILE
from fxquant.calibration.recipes.reconstruction import ADAROUND, GPTAQ, QDROP, RECONSTRUCT, RECONSTRUCT_STATIC, SEQUENTIAL
from fxquant.calibration.recipes.rotations import QUAROT, RECONSTRUCT_ROTATED, SEARCH_ROTATED
from fxquant.calibration.recipes.search import SEARCH, SEARCH_STATIC
from fxquant.calibration.recipes.vit import VIT_RECIPES
from fxquant.calibration.recipes.weights import AWQ, GPTQ, SMOOTHQUANT, SMOOTHQUANT_PLUS
from fxquant.errors import CalibrationError

_RANGES = (MINMAX, EMA, PERCENTILE, MSE, OMSE, KL)
_LINEARS = (SMOOTHQUANT, SMOOTHQUANT_PLUS, AWQ, GPTQ, FLEXQ, FIREQ, FPQ, QUAROT, SEARCH, SEARCH_STATIC, SEARCH_ROTATED)
_BEHIND = (GPTAQ, SEQUENTIAL, RECONSTRUCT, RECONSTRUCT_STATIC, RECONSTRUCT_ROTATED, ADAROUND, QDROP)
_ALL = (*_RANGES, *_LINEARS, *_BEHIND, *VIT_RECIPES)
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _ALL}

__all__ = ["RECIPES", "Gathered", "Recipe", "find_recipe"]


def find_recipe(method: str) -> Recipe:
    """The recipe of a name.

    Raises:
        CalibrationError: there is none of this name; the nearest are named.
    """
    if method in RECIPES:
        return RECIPES[method]
    close = difflib.get_close_matches(method, RECIPES, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(RECIPES)}"
    raise CalibrationError(f"unknown method {method!r}; {hint}")
