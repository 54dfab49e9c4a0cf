"""Fine-tune Mantis multi-image vision-language models on one small GPU.

>>> import mantis_lite
>>> recipe = mantis_lite.load_recipe("chat", ["data=my.json"])
>>> recipe.packing.max_length
8192
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import RecipeError

if TYPE_CHECKING:
    from .chat import MantisChat
    from .recipe import Recipe
    from .recipe_file import load_recipe
    from .scoring import Predictions
    from .training.progress import How

__version__ = "0.1.0"
__all__ = ["MantisChat", "Recipe", "load_recipe", "predict", "train"]


def train(
    recipe: Recipe | str | Path,
    overrides: Iterable[str] = (),
    from_scratch: bool = False,
    import_upstream: bool = False,
    show: How = "auto",
) -> Path:
    """Train a recipe, or the one of a name with `key=value` overrides; returns the folder of what was trained.

    `from_scratch` moves an old run aside; `import_upstream` allows the pickles of a `model.adapter` that the original
    Mantis code wrote. `show`: "auto" is a bar at a terminal and in a notebook, and lines elsewhere;
    or "bar", "lines", "json", "quiet". Raises RecipeError, DataError, SampleError and FitError, each saying what to do.
    """
    from .process import prepare_process

    prepare_process()
    from .recipe import Recipe
    from .recipe_file import load_recipe
    from .shown import train as train_shown  # torch is imported when it is needed

    if isinstance(recipe, Recipe):
        if overrides:
            raise RecipeError(
                "train: overrides beside a Recipe\n  Give them to load_recipe, or the recipe by its name."
            )
    else:
        recipe = load_recipe(recipe, overrides)
    return train_shown(recipe, show, from_scratch, import_upstream)


def predict(
    source: str | Path, overrides: Iterable[str] = (), metrics: bool = False, output: Path | None = None
) -> Predictions:
    """Score the rows of `data=...` with a run of task=classify, or a model with a score head; writes a JSON line each.

    `metrics` compares with the rows' own labels. Raises RecipeError, DataError, SampleError and FitError.
    """
    from .process import prepare_process

    prepare_process()
    from . import scoring  # as above

    return scoring.predict(source, list(overrides), metrics, output)


def __getattr__(name: str) -> Any:
    """MantisChat, Recipe and load_recipe, imported once they are asked for: the command line asks for none at first."""
    if name == "MantisChat":
        from .process import prepare_process

        prepare_process()
        from .chat import MantisChat

        return MantisChat
    if name == "Recipe":
        from .recipe import Recipe

        return Recipe
    if name == "load_recipe":
        from .recipe_file import load_recipe

        return load_recipe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
