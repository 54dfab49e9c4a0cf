"""What a config states of a score head, and a recipe asks of it: labels, and what they are."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedConfig

from ..data.labels import Labels
from ..errors import RecipeError
from ..recipe import HeadRecipe, Problem, Recipe
from .checkpoint import Checkpoint, read_config

PROBLEMS: dict[Problem, str] = {
    "regression": "regression",
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
}
"""A recipe's words for what labels are, and transformers'."""


def labels_of(config: PreTrainedConfig, head: HeadRecipe, name: str) -> Labels:
    """The labels that the config of a head, called `name`, states; the recipe names those of one that does not.

    Raises RecipeError where the two differ.
    """
    names = tuple(config.id2label[at] for at in range(config.num_labels))
    stated = tuple(head.labels or names)
    unnamed = names == tuple(f"LABEL_{at}" for at in range(len(names)))  # as VideoScore's
    if len(stated) != len(names) or not (unnamed or stated == names):
        raise RecipeError(
            f"head.labels: {', '.join(stated)}, and the head of {name} scores {', '.join(names)}\n"
            "  State its labels in its order, or take a model without a head."
        )
    problem = {of: problem for problem, of in PROBLEMS.items()}.get(config.problem_type or "", head.problem)
    assert problem
    return Labels(problem, stated)


def stated_head(checkpoint: Checkpoint, recipe: Recipe) -> HeadRecipe | None:
    """The head that a recipe trains, where its task has one; with the labels of a head that is there already.

    Raises RecipeError where what is to be trained on scores something else, or does not say what.
    """
    if recipe.task != "classify":
        return None
    name, config = checkpoint.name, checkpoint.config if checkpoint.has_head else None
    if recipe.model.adapter and (Path(recipe.model.adapter) / "config.json").is_file():
        name, config = recipe.model.adapter, read_config(Path(recipe.model.adapter))
    if config is None:
        return recipe.head
    labels = labels_of(config, recipe.head, name)
    if labels.problem != recipe.head.problem:
        found = f"{recipe.head.problem}, and the head of {name} was trained for {labels.problem}"
        raise RecipeError(f"head.problem: {found}\n  Set head.problem={labels.problem}.")
    if bool(getattr(config, "score_token_ids", None)) != (recipe.head.score == "special_tokens"):
        found = f"{recipe.head.score}, and the head of {name} reads its labels otherwise"
        raise RecipeError(f"head.score: {found}\n  Set it as the head was trained.")
    if recipe.head.labels is None and labels.names[0] == "LABEL_0":
        found = f"the head of {name} has {len(labels.names)} labels and does not name them"
        raise RecipeError(f"head.labels: {found}\n  State them, in its order.")
    return recipe.head.model_copy(update={"labels": list(labels.names)})
