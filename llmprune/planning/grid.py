"""A grid of recipes: one cell per combination of the values that were given, all of them checked.

An N:M pattern sets its own sparsity, so a cell with one is there once, whatever sparsities were given.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llmprune.common.messages import shown
from llmprune.planning.choice import LIGHT, inherited
from llmprune.recipe import loading as recipes
from llmprune.recipe.types import Recipe
from llmprune.text.mixture import public_name

_AMOUNTS = ("sparsity", "pattern")  # fields that the amount of a cell tells, so its method need not
_LONGEST = 80  # characters of a cell's name


@dataclass(frozen=True)
class Grid:
    """What was given: for every field one value or several. An empty field has the value of the recipe.

    Attributes:
        recipes: by name, as YAML files, or as mappings of fields.
        sparsities, patterns, pruners: values of these fields.
        settings: dotted key of a field -> its values.
        common: fields that are the same for all cells.
    """

    recipes: Sequence[Any] = ()
    sparsities: Sequence[float] = ()
    patterns: Sequence[str] = ()
    pruners: Sequence[Any] = ()
    settings: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    common: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, without local paths."""
        return {
            "recipe": [_named(recipe) for recipe in self.recipes],
            "sparsity": list(self.sparsities),
            "pattern": list(self.patterns),
            "pruner": list(self.pruners),
            "settings": {key: [_public(key, v) for v in values] for key, values in self.settings.items()},
        }


@dataclass(frozen=True)
class Cell:
    """One recipe of a grid.

    Attributes:
        name: unique, and fit to be that of a folder.
        method: what is pruned with: the recipe, and what the grid varies in it.
        amount: how much: the sparsity, or the N:M pattern.
        recipe: with every default filled in.
        remarks: what the user should know of how the recipe came about.
    """

    name: str
    method: str
    amount: str
    recipe: Recipe
    remarks: tuple[str, ...] = ()


def cells_of(grid: Grid) -> tuple[list[Cell], int]:
    """The cells of a grid, in the order of what was given, and how many combinations were left out.

    Left out are combinations with the same recipe as another one.

    Raises:
        ValueError: no recipe and no pruner, a combination that is no recipe, or two methods with one name.
    """
    if not grid.recipes and not grid.pruners:
        raise ValueError(
            "nothing to compare: name recipes with --recipe wanda,sparsegpt,best or pruners with --pruner "
            "wanda,sparsegpt"
        )
    found: dict[str, Cell] = {}
    taken: dict[tuple[str, str], str] = {}
    left_out = 0
    for recipe, pruner, chosen, pattern, sparsity in _combinations(grid):
        cell = _cell(grid, recipe, {"pruner": pruner, "pattern": pattern, "sparsity": sparsity}, chosen)
        key = key_of(cell.recipe)
        if key in found:
            left_out += 1
            continue
        if (cell.method, cell.amount) in taken:
            raise ValueError(
                f"two cells would be called {cell.method} at {cell.amount}; name their recipes differently, "
                "or give what they differ in with --set"
            )
        taken[cell.method, cell.amount] = key
        found[key] = cell
    return _with_names(list(found.values())), left_out


def key_of(recipe: Recipe) -> str:
    """The same for recipes that prune alike and have one name."""
    plain = {key: value for key, value in recipe.as_dict().items() if key != "chosen"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _combinations(grid: Grid) -> Any:
    not_given: list[Any] = [None]
    settings = [[(key, value) for value in values] for key, values in grid.settings.items()]
    return itertools.product(
        grid.recipes or not_given,
        grid.pruners or not_given,
        [dict(pairs) for pairs in itertools.product(*settings)],
        grid.patterns or not_given,
        grid.sparsities or not_given,
    )


def _cell(grid: Grid, recipe: Any, axes: Mapping[str, Any], chosen: Mapping[str, Any]) -> Cell:
    given = {key: value for key, value in axes.items() if value is not None}
    overrides = {**grid.common, **given, **chosen}
    named = LIGHT if recipe is None else recipe
    loaded = _loaded(named, overrides)
    varied = [
        f"{key}={_word(key, value)}"
        for key, value in chosen.items()
        if len(grid.settings[key]) > 1 and key not in _AMOUNTS
    ]
    pruner = [loaded.pruner.name] if grid.pruners else []
    first = [] if recipe is None and pruner else [loaded.name]
    remarks = inherited(overrides, loaded) if recipe is None else ()
    amount = loaded.pattern if ":" in loaded.pattern else f"{loaded.sparsity:g}"
    return Cell("", " ".join([*first, *pruner, *varied]), amount, loaded, remarks)


def _loaded(recipe: Any, overrides: dict[str, Any]) -> Recipe:
    """The recipe with the overrides; the sparsity among them does not count where the pattern sets it."""
    if "sparsity" in overrides:
        rest = {key: value for key, value in overrides.items() if key != "sparsity"}
        loaded = recipes.load(recipe, rest)
        if ":" in loaded.pattern:
            del overrides["sparsity"]
            return loaded
    return recipes.load(recipe, overrides)


def _with_names(cells: Sequence[Cell]) -> list[Cell]:
    """The cells with their names, which do not depend on one another unless they would be the same."""
    plain = [_plain_name(cell) for cell in cells]
    names = []
    for cell, name in zip(cells, plain, strict=True):
        twice = len(name) > _LONGEST or [other.lower() for other in plain].count(name.lower()) > 1
        names.append(f"{name[: _LONGEST - 9]}-{key_of(cell.recipe)[:8]}" if twice else name)
    return [replace(cell, name=name) for cell, name in zip(cells, names, strict=True)]


def _plain_name(cell: Cell) -> str:
    text = f"{cell.method} {cell.amount.replace(':', 'to')}".replace(" ", "-")
    return re.sub(r"[^A-Za-z0-9._=+-]+", "_", text).lstrip(".-") or "cell"


def _named(recipe: Any) -> str:
    return str(recipe.get("name", "custom")) if isinstance(recipe, Mapping) else recipes.name_of(recipe)


def _public(key: str, value: Any) -> Any:
    """A value of a setting without a local path."""
    return public_name(value) if key == "calibration.source" and isinstance(value, str) else value


def _word(key: str, value: Any) -> str:
    """A value in the name of a method."""
    value = _public(key, value)
    if isinstance(value, Mapping) and "name" in value:
        value = value["name"]
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return shown(text)[1:-1].replace(" ", "")
