"""Trials for allocators that search: prune the model each way and keep only its loss on held-out rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from llmprune import registry
from llmprune.contracts import Allocator, CalibrationSet, Measure
from llmprune.evaluation.perplexity import losses_of
from llmprune.machine.device import available_memory, exact_matmul
from llmprune.model.activations import BlockInputs
from llmprune.numerics.gram import finite
from llmprune.planning.plan import Findings, Resources, make_plan
from llmprune.recipe.types import AlgorithmSpec, Recipe
from llmprune.run.clock import Clock
from llmprune.run.corridor import prune_blocks
from llmprune.run.shared import Run
from llmprune.run.streams import HeldOutStream

_ONE_IN = 8  # calibration rows held out
_WORST = 1e9  # stands for a loss that is no finite number, which JSON does not know


def search(run: Run, measures: Mapping[int, Measure], resources: Resources) -> dict[int, float]:
    """Mean loss per token of every trial of the recipe's allocator, by its number; the same on every process.

    Empty for an allocator that tries nothing. Trials prune with one pruner and no further steps. The reporter
    gets a step per block and trial.

    Args:
        run: the run, with a draft of its plan. measures: what the allocator measured of each block.
        resources: as for the plan.

    Raises:
        ValueError: fewer calibration rows than one to hold out and one to prune with per process.
    """
    allocator = run.recipe.build_allocator()
    if not allocator.trials:
        return {}
    training, held = _split(run.calibration)
    if len(training.tokens) < run.team.size:
        raise ValueError(
            f"allocator {run.recipe.allocator.name!r} holds out {len(held)} of {run.sequences} calibration "
            f"samples, and {run.team.size} processes need one each of the others; use more samples"
        )
    light = dataclasses.replace(run, recipe=_light(run.recipe, allocator), calibration=training)
    losses = {}
    for number, trial in enumerate(allocator.trials):
        loss = _loss(light, held, Findings(measures, {number: 0.0}), resources)
        losses[number] = min(finite(loss), _WORST)
        run.reporter.note(f"{trial}: held-out loss {losses[number]:.4f}")
    if min(losses.values()) == _WORST:
        raise ValueError(
            f"no trial of allocator {run.recipe.allocator.name!r} ends with a finite loss; "
            "use another trial pruner or float32"
        )
    return losses


def _split(rows: CalibrationSet) -> tuple[CalibrationSet, Tensor]:
    """The rows to prune with and the rows to hold out, int64 [n, T]: every eighth one, else the last."""
    kept = torch.ones(len(rows.tokens), dtype=torch.bool)
    if len(rows.tokens) >= _ONE_IN:
        kept[_ONE_IN - 1 :: _ONE_IN] = False
    else:
        kept[-1] = False
    return dataclasses.replace(rows, tokens=rows.tokens[kept]), rows.tokens[~kept]


def _light(recipe: Recipe, allocator: Allocator) -> Recipe:
    """The recipe of the trials. Weights compete with one another as in the recipe itself."""
    pruner = AlgorithmSpec(name=allocator.trial_pruner) if allocator.trial_pruner else recipe.pruner
    scope = recipe.scope or registry.find("pruners", recipe.pruner.name).scope  # type: ignore[attr-defined]
    return dataclasses.replace(recipe, pruner=pruner, scope=scope, refiner=None, update=())


def _loss(run: Run, held: Tensor, findings: Findings, resources: Resources) -> float:
    """Mean loss per token on the held-out rows of the model pruned as one trial says."""
    skeleton, (n, t) = run.skeleton, run.calibration.tokens.shape
    resources = dataclasses.replace(resources, available=run.team.on_first(available_memory))
    plan = make_plan(run.recipe, skeleton, n + len(held), t, resources, findings)
    plan = dataclasses.replace(plan, samples=n)  # memory for all rows, of which some are held out
    run = dataclasses.replace(run, plan=plan)
    mine = held[run.team.share(len(held))]
    beside = []
    if len(mine):
        inputs = BlockInputs(skeleton, mine, skeleton.device, run.store, run.reporter.note)
        beside.append(HeldOutStream(inputs))
    clock = Clock(skeleton.device)
    prune_blocks(run, skeleton.source, 0, clock, lambda block: run.reporter.step(), beside)
    with exact_matmul():
        found = sum(sum(losses_of(stream.inputs, mine)) for stream in beside)
        total = torch.tensor(float(found), dtype=torch.float64)
    run.team.add(total)
    return total.item() / len(held)
