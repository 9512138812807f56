"""Which recipe runs when none was named.

The best one where its memory and its time fit this machine, else the light one.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from llmprune import calibration as calibrations
from llmprune.calibration.tokens import read_tokens
from llmprune.machine import device as devices
from llmprune.model.opening import Model
from llmprune.planning.estimate import seconds_of
from llmprune.planning.plan import Resources, make_plan
from llmprune.recipe import loading as recipes
from llmprune.recipe.types import Recipe
from llmprune.text.tokenisation import default_length

BEST, LIGHT = "best", "dsnot"
TIME_LIMIT = 60.0  # minutes
# Naming a method by hand means to build on the light recipe, where only the named part is another.
_METHODS = ("pruner", "refiner", "update", "allocator", "order", "permute")


def choose(overrides: dict[str, Any], model: Model, calibration: Any, limit: float, processes: int) -> Recipe:
    """The recipe for a model, with `overrides`; its `chosen` says why.

    Args:
        overrides: fields of the recipe, by dotted key. calibration: the source the run was given.
        limit: minutes the best recipe may take, 0 for never. processes: how many share the work.
    """
    light = recipes.load(LIGHT, overrides)
    named = sorted({key.partition(".")[0] for key in overrides} & set(_METHODS))
    if named:
        return light
    if limit <= 0:
        return dataclasses.replace(light, chosen=f"{LIGHT}, since the time limit is 0")
    best = recipes.load(BEST, overrides)
    samples, length = _size(best, model, calibration)
    available = devices.available_memory()
    resources = Resources(available=available, processes=processes)
    plan = make_plan(best, model.skeleton, samples, length, resources)
    device = model.skeleton.device
    if plan.memory > plan.available or (plan.device_memory or 0) > devices.free_memory(device):
        needed = max(plan.memory, plan.device_memory or 0) / 1e9
        return dataclasses.replace(
            light, chosen=f"{LIGHT}, since {BEST} would need about {needed:.1f} GB, more than is free"
        )
    minutes = seconds_of(best, model, samples, length) / processes / 60
    told = f"about {minutes:.0f} min" if minutes >= 1 else "less than a minute"
    if minutes > limit:
        told = f"about {minutes / 60:.0f} h" if minutes > 120 else told
        why = f"{LIGHT}, since {BEST} would take {told} here (--time-limit {limit:g})"
        if light.pattern == "unstructured":
            why += "; --allocator fisher makes it better and takes more memory"
        return dataclasses.replace(light, chosen=why)
    why = f"{BEST}, which takes {told} here (--time-limit {limit:g})"
    return dataclasses.replace(best, chosen="; ".join(filter(None, (why, best.chosen))))


def _size(recipe: Recipe, model: Model, calibration: Any) -> tuple[int, int]:
    """Rows and tokens per row the calibration will have."""
    if isinstance(calibration, str) and calibration.endswith(".safetensors") and Path(calibration).is_file():
        calibration = read_tokens(Path(calibration))
    if isinstance(calibration, Tensor) and calibration.ndim == 2:
        return calibration.shape[0], calibration.shape[1]
    spec = recipe.calibration
    return spec.samples or calibrations.SAMPLES, spec.sequence_length or default_length(model.limit)


def inherited(overrides: dict[str, Any], recipe: Recipe) -> tuple[str, ...]:
    """A note where methods were named without a recipe: the light recipe's refiner still runs."""
    named = [
        key
        for key in ("pruner", "update", "allocator", "order", "permute")
        if any(k.partition(".")[0] == key for k in overrides)
    ]
    if not named or recipe.refiner is None or any(key.partition(".")[0] == "refiner" for key in overrides):
        return ()
    return (
        f"note: refiner {recipe.refiner.name} comes from recipe {recipe.name}, in which a method named "
        "without --recipe takes its place; --refiner none leaves it out",
    )
