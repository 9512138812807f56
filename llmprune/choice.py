"""Which recipe to run when none was named: the best one where its memory and time fit this machine, else the light one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from llmprune import calibration as calibrations
from llmprune import device as devices
from llmprune import recipe as recipes
from llmprune.calibration.tokens import read_tokens
from llmprune.model.opening import Model
from llmprune.model.targets import find_targets
from llmprune.plan import make_plan
from llmprune.recipe import Recipe

BEST, LIGHT = "best", "dsnot"
TIME_LIMIT = 60.0  # minutes
_EFFICIENCY = 0.5  # of a bare matrix product, reached by a block's forward pass
_ITERATIONS = 60  # of ADMM, as measured at 50 to 80 %
# Naming a method by hand means to build on the light recipe, where only the named part is another.
_METHODS = ("pruner", "refiner", "update", "allocator", "order", "permute")


def choose(overrides: dict[str, Any], model: Model, calibration: Any, limit: float, processes: int) -> Recipe:
    """The recipe for a model, with `overrides`; its `chosen` says why.

    Args:
        calibration: what the run was given as its source. limit: minutes the best recipe may take, 0 for never.
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
    plan = make_plan(best, model.skeleton, model.source, samples, length, available=available, processes=processes)
    device = model.skeleton.device
    if plan.memory > plan.available or (plan.device_memory or 0) > devices.free_memory(device):
        needed = max(plan.memory, plan.device_memory or 0) / 1e9
        return dataclasses.replace(light, chosen=f"{LIGHT}, since {BEST} would need about {needed:.1f} GB, more than is free")
    minutes = seconds_of(best, model, samples, length) / processes / 60
    told = f"about {minutes:.0f} min" if minutes >= 1 else "less than a minute"
    if minutes > limit:
        told = f"about {minutes / 60:.0f} h" if minutes > 120 else told
        return dataclasses.replace(light, chosen=f"{LIGHT}, since {BEST} would take {told} here (--time-limit {limit:g})")
    why = f"{BEST}, which takes {told} here (--time-limit {limit:g})"
    return dataclasses.replace(best, chosen="; ".join(filter(None, (why, best.chosen))))


def _size(recipe: Recipe, model: Model, calibration: Any) -> tuple[int, int]:
    """Rows and tokens per row the calibration will have."""
    if isinstance(calibration, str) and calibration.endswith(".safetensors") and Path(calibration).is_file():
        calibration = read_tokens(Path(calibration))
    if isinstance(calibration, Tensor) and calibration.ndim == 2:
        return calibration.shape[0], calibration.shape[1]
    spec = recipe.calibration
    return spec.samples or calibrations.SAMPLES, spec.sequence_length or calibrations.default_length(model.limit)


def seconds_of(recipe: Recipe, model: Model, samples: int, length: int) -> float:
    """Estimated seconds of the best recipe on this machine, from a few products timed on it; right within a factor of about two."""
    skeleton = model.skeleton
    rate, exact = (devices.matmul_rate(skeleton.device, dtype) for dtype in (skeleton.dtype, devices.DTYPES["float32"]))
    width = skeleton.model.config.get_text_config().hidden_size
    tokens, total = samples * length, 0.0
    decompositions: dict[int, float] = {}
    allocator = recipe.build_allocator()
    for name, block in skeleton.blocks.items():
        shapes = [t.shape for t in find_targets(name, block)]
        per_token = 2 * sum(r * c for r, c in shapes) + 4 * length * width
        trained = _trained_rows(recipe) * length
        # Pruned and dense stream, each seen in parts for the statistics and once more as a whole; training costs three passes. An
        # allocator measures the dense stream once and prunes once per trial, with a cheap pruner.
        passes = tokens * (5 + 2 * bool(allocator.needs) + 3 * len(allocator.trials)) + trained * 3
        inputs = sorted({c for _, c in shapes}) + [width] * 2
        grams = (2 + len(allocator.trials)) * 2 * tokens * sum(c * c for c in inputs)
        admm = _ITERATIONS * sum(4 * r * c * c for r, c in shapes) / exact + _ITERATIONS * sum(r * c for r, c in shapes) * 2e-8
        for c in inputs:
            decompositions.setdefault(c, devices.eigh_seconds(skeleton.device, c))
        total += passes * per_token / (rate * _EFFICIENCY) + grams / exact + admm + sum(decompositions[c] for c in inputs)
    return total


def _trained_rows(recipe: Recipe) -> float:
    """Calibration sequences that block tuning runs through, forwards and backwards."""
    rows = 0.0
    for update in recipe.update:
        if update.name == "block-tune":
            rows += update.options["steps"] * update.options["batch"] * (1 + (len(update.options["rates"]) - 1) / 8)
    return rows
