"""Recipes by the name that ``fxquant.calibrate(method=...)`` takes."""

import difflib

from fxquant.calibration.recipes.base import Gathered, Recipe
from fxquant.calibration.recipes.floating import FPQ
from fxquant.calibration.recipes.llm import FIREQ, FLEXQ
from fxquant.calibration.recipes.ranges import MINMAX, MSE, PERCENTILE
from fxquant.calibration.recipes.reconstruction import ADAROUND, QDROP, RECONSTRUCT, SEQUENTIAL
from fxquant.calibration.recipes.search import SEARCH, SEARCH_STATIC
from fxquant.calibration.recipes.vit import VIT_RECIPES
from fxquant.calibration.recipes.weights import AWQ, GPTQ, SMOOTHQUANT, SMOOTHQUANT_PLUS
from fxquant.errors import CalibrationError

_LINEARS = (MINMAX, PERCENTILE, MSE, SMOOTHQUANT, SMOOTHQUANT_PLUS, AWQ, GPTQ, FLEXQ, FIREQ, FPQ, SEARCH, SEARCH_STATIC)
_ALL = (*_LINEARS, SEQUENTIAL, RECONSTRUCT, ADAROUND, QDROP, *VIT_RECIPES)
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
