"""One matrix through pruner and steps, every promise checked."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmprune.contracts import InputStats, Job, Pruned, Pruner, Step
from llmprune.model.targets import Target
from llmprune.numerics.counts import all_finite, zeros_of
from llmprune.planning.plan import MatrixPlan
from llmprune.recipe.types import AlgorithmSpec, Recipe
from llmprune.statistics.sums import relative_error

Row = dict[str, Any]


def prune_matrix(
    target: Target,
    plan: MatrixPlan,
    stats: InputStats,
    pruner: Pruner,
    steps: Sequence[tuple[AlgorithmSpec, Step]],
    recipe: Recipe,
    stored: Tensor,
) -> tuple[Tensor, Tensor, Row]:
    """One matrix through pruner and steps: its weight in the stored dtype (on the CPU, [R, C]), its mask and its record row."""
    started = time.monotonic()
    job = Job(
        target.name,
        target.read(stored),
        stats,
        plan.pattern,
        plan.sparsity,
        seeded(recipe.seed, target.weight_name),
    )
    pruned = pruner.prune(job)
    check_promises(job, pruned, pruner, None)
    steps = [(spec, step) for spec, step in steps if spec.applies(target.name)]
    for _, step in steps:
        before, pruned = pruned, step.apply(job, pruned)
        check_promises(job, pruned, step, before)
    final = pruned.weight.to(stored.dtype)  # the one cast to the checkpoint's dtype
    row = {
        "shape": list(plan.shape),
        "pattern": str(plan.pattern),
        "target_sparsity": plan.sparsity,
        **measured(job.weight, final.float(), stats),
        "pruner": recipe.pruner.name,
        "steps": [spec.name for spec, _ in steps],
        **pruned.notes,
        "seconds": round(time.monotonic() - started, 4),
    }
    return final.cpu(), pruned.keep, row


def seeded(seed: int, name: str) -> torch.Generator:
    """The generator of everything random about one matrix or block, the same in any order."""
    return torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")
    )


def measured(dense: Tensor, final: Tensor, stats: InputStats) -> Row:
    """What a row of the record says of a weight as stored, [R, C] in float32: its zeros and its error."""
    zeros = zeros_of(final)
    return {
        "sparsity": zeros / final.numel(),
        "zeros": zeros,
        "relative_error": relative_error(dense, final, stats),
    }


def check_promises(job: Job, pruned: Pruned, algorithm: Pruner | Step, before: Pruned | None) -> None:
    """The promises of the rooms, kept by every step: exact pattern and count, true zeros, finite weights, a fixed mask for updates."""
    name = f"{type(algorithm).__name__} on {job.name}"
    try:
        job.pattern.check(pruned.keep, job.sparsity)
    except ValueError as error:
        raise RuntimeError(f"{name} broke the pattern: {error}") from None
    if not all_finite(pruned.weight):
        raise RuntimeError(f"{name} made NaN or Inf weights; use more calibration samples or another pruner")
    if bool(((pruned.weight != 0) & ~pruned.keep).any()):
        raise RuntimeError(f"{name} left weights where its mask says zero")
    if (
        before is not None
        and isinstance(algorithm, Step)
        and algorithm.changes == "weights"
        and not torch.equal(before.keep, pruned.keep)
    ):
        raise RuntimeError(f"{name} changed the mask, which an update may not")
