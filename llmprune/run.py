"""The corridor: the one loop where the rooms meet. Block by block: load, collect, prune, check, forward, write, free."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmprune.checkpoint.masks import MaskWriter
from llmprune.checkpoint.reader import WeightSource
from llmprune.checkpoint.writer import CheckpointWriter
from llmprune.contracts import CalibrationSet, InputStats, Job, Pruned, Pruner, Step
from llmprune.device import exact_matmul
from llmprune.model.activations import BlockInputs
from llmprune.model.skeleton import Skeleton
from llmprune.model.targets import Target, find_targets
from llmprune.plan import MatrixPlan, Plan, needs_of
from llmprune.recipe import Recipe
from llmprune.stats import Collector, relative_error, sample_positions

Row = dict[str, Any]


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, phase: str) -> None:
        """Count the time since the last lap to a phase."""
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


def prune_blocks(
    recipe: Recipe, plan: Plan, skeleton: Skeleton, source: WeightSource, calibration: CalibrationSet, writer: CheckpointWriter,
    clock: Clock, block_done: Callable[[], None],
) -> list[Row]:  # fmt: skip
    """Prune every block into the writer's folder; returns one row per matrix. The model is never whole in memory."""
    pruner, refiner, needs = recipe.build_pruner(), recipe.build_refiner(), needs_of(recipe)
    masks = MaskWriter(writer.folder / "masks.safetensors", {skeleton.stored[f"{n}.weight"]: m.shape for n, m in plan.matrices.items()})
    positions = sample_positions(plan.samples, plan.sequence_length, recipe.seed)
    inputs = BlockInputs(skeleton, calibration.tokens, skeleton.device)
    clock.lap("forward")
    rows: list[Row] = []
    written: set[str] = set()
    for number, (block_name, block) in enumerate(skeleton.blocks.items()):
        names = skeleton.parameters_of(block_name)
        skeleton.load(names)
        shard = {skeleton.stored[n]: source.load(skeleton.stored[n]) for n in names}
        clock.lap("read")
        targets = [t for t in find_targets(block_name, block) if t.name in plan.matrices]
        collector = Collector(needs, positions)
        with exact_matmul():
            with collector.attached({t.name: t.module for t in targets}):
                _collect(inputs, number, collector, plan.sequence_length)
            stats = collector.results()
            clock.lap("forward")
            for target in targets:
                stored = skeleton.stored[target.weight_name]
                steps = [refiner] if refiner and recipe.refiner and recipe.refiner.applies(target.name) else []
                weight, keep, row = prune_matrix(
                    target, plan.matrices[target.name], stats[target.name], pruner, steps, recipe, shard[stored]
                )
                shard[stored] = target.stored(weight)
                target.assign(weight)
                masks.append(stored, keep)
                rows.append({"name": stored, **row})
        del stats
        clock.lap("prune")
        inputs.forward(number)
        skeleton.free(names)
        clock.lap("forward")
        writer.shard(number + 1, shard)
        written |= set(shard)
        clock.lap("write")
        del shard, targets
        block_done()
    masks.close()
    writer.shard(writer.shards, {n: source.load(n) for n in source.tensors if n not in written})
    clock.lap("write")
    return rows


def _collect(inputs: BlockInputs, number: int, collector: Collector, tokens: int) -> None:
    inputs.forward(number, before=lambda part: collector.batch(part.start, (part.stop - part.start, tokens)), store=False)


def prune_matrix(
    target: Target, plan: MatrixPlan, stats: InputStats, pruner: Pruner, steps: list[Step], recipe: Recipe, stored: Tensor
) -> tuple[Tensor, Tensor, Row]:
    """One matrix through pruner and steps: its weight in the stored dtype (on the CPU, [R, C]), its mask and its record row."""
    started = time.monotonic()
    seed = int.from_bytes(hashlib.sha256(f"{recipe.seed}:{target.weight_name}".encode()).digest()[:7], "big")
    job = Job(target.name, target.read(), stats, plan.pattern, plan.sparsity, torch.Generator().manual_seed(seed))
    pruned = pruner.prune(job)
    _check(job, pruned, pruner, None)
    for step in steps:
        before, pruned = pruned, step.apply(job, pruned)
        _check(job, pruned, step, before)
    final = pruned.weight.to(stored.dtype)  # the one cast to the checkpoint's dtype
    zeros = int((final == 0).sum())
    row = {
        "shape": list(plan.shape),
        "pattern": str(plan.pattern),
        "target_sparsity": plan.sparsity,
        "sparsity": zeros / final.numel(),
        "zeros": zeros,
        "relative_error": relative_error(job.weight, final.float(), stats),
        "pruner": recipe.pruner.name,
        "steps": [recipe.refiner.name for _ in steps if recipe.refiner],
        "seconds": round(time.monotonic() - started, 4),
    }
    return final.cpu(), pruned.keep, row


def _check(job: Job, pruned: Pruned, algorithm: Pruner | Step, before: Pruned | None) -> None:
    """The promises of the rooms, kept by every step: exact pattern and count, true zeros, finite weights, a fixed mask for updates."""
    name = f"{type(algorithm).__name__} on {job.name}"
    try:
        job.pattern.check(pruned.keep, job.sparsity)
    except ValueError as error:
        raise RuntimeError(f"{name} broke the pattern: {error}") from None
    if not bool(pruned.weight.isfinite().all()):
        raise RuntimeError(f"{name} made NaN or Inf weights; use more calibration samples or another pruner")
    if bool((pruned.weight * ~pruned.keep).any()):
        raise RuntimeError(f"{name} left weights where its mask says zero")
    if before is not None and isinstance(algorithm, Step) and algorithm.changes == "weights" and not torch.equal(before.keep, pruned.keep):
        raise RuntimeError(f"{name} changed the mask, which an update may not")
