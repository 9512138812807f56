"""Trials for allocators that search: the model is pruned each way, block by block, and nothing is kept but its loss on held-out rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from llmprune import registry
from llmprune.contracts import Allocator, CalibrationSet
from llmprune.evaluation.perplexity import losses_of
from llmprune.machine.device import available_memory, exact_matmul
from llmprune.machine.processes import Team
from llmprune.model.activations import BlockInputs, Store, in_memory, on_disk
from llmprune.model.opening import Model
from llmprune.numerics.gram import finite
from llmprune.planning.plan import make_plan
from llmprune.recipe.types import AlgorithmSpec, Recipe
from llmprune.run.corridor import Clock, prune_blocks

_ONE_IN = 8  # calibration rows held out
_WORST = 1e9  # stands for a loss that is no finite number, which JSON does not know


def search(
    recipe: Recipe,
    measures: Mapping[int, float],
    model: Model,
    rows: CalibrationSet,
    folder: Path,
    offload: str,
    team: Team,
    block_done: Callable[[], None],
    note: Callable[[str], None],
) -> dict[int, float]:
    """Mean loss per token of every trial, by its number, the same on every process; trials prune with one pruner and no further steps.

    Args:
        measures: what the allocator measured of each block. folder: for block inputs that do not fit into RAM.

    Raises:
        ValueError: fewer calibration rows than one to hold out and one to prune with per process.
    """
    allocator = recipe.build_allocator()
    if not allocator.trials:
        return {}
    held = rows.tokens[_ONE_IN - 1 :: _ONE_IN] if len(rows.tokens) >= _ONE_IN else rows.tokens[-1:]
    kept = torch.ones(len(rows.tokens), dtype=torch.bool)
    kept[_ONE_IN - 1 :: _ONE_IN] = False
    kept[-1] &= len(rows.tokens) >= _ONE_IN
    training = dataclasses.replace(rows, tokens=rows.tokens[kept])
    if len(training.tokens) < team.size:
        raise ValueError(
            f"allocator {recipe.allocator.name!r} holds out {len(held)} of {len(rows.tokens)} calibration samples, and {team.size} "
            "processes need one each of the others; use more samples"
        )
    light = _light(recipe, allocator)
    losses = {}
    for number, trial in enumerate(allocator.trials):
        loss = _loss(light, measures, number, model, training, held, folder, offload, team, block_done, note)
        losses[number] = min(finite(loss), _WORST)
        note(f"{trial}: held-out loss {losses[number]:.4f}")
    if min(losses.values()) == _WORST:
        raise ValueError(
            f"no trial of allocator {recipe.allocator.name!r} ends with a finite loss; use another trial pruner or float32"
        )
    return losses


def _light(recipe: Recipe, allocator: Allocator) -> Recipe:
    """The recipe of the trials: masks are compared as in the recipe itself."""
    pruner = AlgorithmSpec(name=allocator.trial_pruner) if allocator.trial_pruner else recipe.pruner
    scope = recipe.scope or registry.find("pruners", recipe.pruner.name).scope  # type: ignore[attr-defined]
    return dataclasses.replace(recipe, pruner=pruner, scope=scope, refiner=None, update=())


def _loss(
    recipe: Recipe,
    measures: Mapping[int, float],
    trial: int,
    model: Model,
    training: CalibrationSet,
    held: Tensor,
    folder: Path,
    offload: str,
    team: Team,
    block_done: Callable[[], None],
    note: Callable[[str], None],
) -> float:
    skeleton, (n, t) = model.skeleton, training.tokens.shape
    plan = make_plan(
        recipe,
        skeleton,
        model.source,
        n + len(held),
        t,
        offload=offload,
        available=team.on_first(available_memory),
        processes=team.size,
        measures=measures,
        losses={trial: 0.0},
    )
    plan = dataclasses.replace(plan, samples=n)  # the others are held out
    store: Store = on_disk(folder) if plan.offload == "disk" else in_memory
    mine = held[team.share(len(held))]
    beside = BlockInputs(skeleton, mine, skeleton.device, store, note) if len(mine) else None
    prune_blocks(
        recipe,
        plan,
        skeleton,
        model.source,
        training,
        0,
        team,
        Clock(skeleton.device),
        store,
        note,
        lambda *block: block_done(),
        beside,
    )
    with exact_matmul():
        total = torch.tensor(sum(losses_of(beside, mine)) if beside else 0.0, dtype=torch.float64)
    team.add(total)
    return total.item() / len(held)
