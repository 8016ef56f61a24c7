"""One readable file for each phase of K2.5: what is trained, on what, with which numbers."""

from difflib import get_close_matches

from k25sys.errors import ConfigError, message
from k25sys.recipes.long_context import RECIPE as LONG_CONTEXT
from k25sys.recipes.pretrain import RECIPE as PRETRAIN
from k25sys.recipes.recipe import Recipe
from k25sys.recipes.sft import RECIPE as SFT
from k25sys.recipes.vit import PROJECTOR
from k25sys.recipes.vit import RECIPE as VIT


def recipes() -> dict[str, Recipe]:
    """All of them, by name, in the order of the phases."""
    found = (VIT, PROJECTOR, PRETRAIN, LONG_CONTEXT, SFT)
    return {recipe.name: recipe for recipe in found}


def find_recipe(name: str) -> Recipe:
    """The one called `name`.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    known = recipes()
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else ""
        raise ConfigError(message("run", "RECIPE", repr(name), ", ".join(known), hint))
    return known[name]
