"""One readable file for each phase of K2.5: what is trained, on what, with which numbers."""

from difflib import get_close_matches

from k25sys.errors import ConfigError, message
from k25sys.recipes import long_context, pretrain, sft, vit
from k25sys.recipes.recipe import Recipe


def recipes() -> dict[str, Recipe]:
    """All of them, by name, in the order of the phases."""
    found = (vit.RECIPE, vit.PROJECTOR, pretrain.RECIPE, long_context.RECIPE, sft.RECIPE)
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
