"""How masks that a run starts from change its recipe, and which of its fields contradict them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmprune.checkpoint.masks import KeepMasks
from llmprune.common.shipped import shipped_names
from llmprune.recipe import loading as recipes
from llmprune.recipe.types import AlgorithmSpec, Recipe
from llmprune.record.record import origin


def overrides(recipe: Any, given: Mapping[str, Any], masks: KeepMasks) -> dict[str, Any]:
    """Fields of a recipe that follow from the masks: their fingerprint, and their sparsity.

    Args:
        recipe: the recipe, by name, as a file or as fields. given: the fields that override it.

    Raises:
        ValueError: what was given decides what the masks have decided.
    """
    for key, value in given.items():
        head = key.partition(".")[0]
        uniform = key == "allocator" and value in ("uniform", {"name": "uniform"})
        if head in ("sparsity", "pruner") or (head == "allocator" and not uniform):
            raise ValueError(
                f"{key} {value!r} contradicts the masks of {masks.path}, which decide it; "
                "leave out one of the two"
            )
        if head == "masks" and value != masks.digest:
            raise _others(str(value), masks)
    found: dict[str, Any] = {"masks": masks.digest}
    own = recipes.load(recipe, given).masks
    if own not in ("", masks.digest):
        raise _others(own, masks)
    if recipes.load(recipe, {**given, **found}).pattern == "unstructured":
        # Cases of a recipe go by it. None prunes everything: a sparsity of 1 is no sparsity.
        found["sparsity"] = min(round(masks.sparsity, 6), 0.999999)
    return found


def without_allocator(recipe: Recipe, given: Mapping[str, Any]) -> Recipe:
    """The recipe; one that comes with the program loses the allocator that nobody has `given`."""
    own = recipe.name in shipped_names("recipes") and "allocator" not in given
    return dataclasses.replace(recipe, allocator=AlgorithmSpec(name="uniform")) if own else recipe


def _others(wanted: str, masks: KeepMasks) -> ValueError:
    return ValueError(
        f"the recipe starts from masks {wanted}, and those of {masks.path} are {masks.digest}; "
        "give the others"
    )


def check_given(recipe: Recipe, masks: KeepMasks | None) -> None:
    """Raise `ValueError` where a recipe starts from masks and none are given.

    Also where the record beside given masks is damaged, which the run's own record will quote.
    """
    if masks is not None:
        origin(masks)
    if recipe.masks and masks is None:
        raise ValueError(
            f"recipe {recipe.name!r} starts from masks {recipe.masks}; give their file with --masks FILE"
        )


def inputs(masks: KeepMasks | None) -> list[tuple[str, Path]]:
    """The file of the masks among what a run reads."""
    return [] if masks is None else [("the masks", masks.path)]
