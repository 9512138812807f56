"""One matrix: pruned, then refined and updated, with the result of every step checked."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmprune import registry
from llmprune.contracts import InputStats, Job, Pruned, Pruner, Step
from llmprune.model.masking import Masking
from llmprune.model.target import Target
from llmprune.numerics.counts import all_finite, zeros_of
from llmprune.planning.plan import MatrixPlan
from llmprune.recipe.given import GivenMasks
from llmprune.recipe.types import ROUNDING, AlgorithmSpec, Recipe
from llmprune.statistics.sums import relative_error

Row = dict[str, Any]
NO_TOKENS = InputStats(0, 0, {})  # statistics of the inputs of a matrix that nothing has reached


class Done(NamedTuple):
    """A pruned matrix as it is written.

    `weight` on the CPU, [R, C], in the dtype of results; `keep` [R, C]; `scales` as in `Pruned`; its `row` of
    the record, which tells of the weight as it will be stored.
    """

    weight: Tensor
    keep: Tensor
    scales: Tensor | None
    row: Row


@dataclass(frozen=True)
class Methods:
    """The algorithms of a recipe, built: its pruner, and the steps that follow on the same matrix."""

    pruner: Pruner
    pruner_name: str
    steps: Sequence[tuple[AlgorithmSpec, Step]]
    seed: int
    dtype: torch.dtype | None  # of results; None for the dtype of the checkpoint
    least: int = 0  # tokens that statistics of an expert must be of

    @staticmethod
    def of(recipe: Recipe, masks: Masking | None = None) -> Methods:
        """Built with the options of the recipe; `masks` take the place of its pruner."""
        experts = recipe.experts
        all_tokens = "all-tokens" in (experts.fewer, f"{experts.tokens}-tokens")
        return Methods(
            GivenMasks(masks.keep) if masks else recipe.build_pruner(),
            recipe.pruner.name,
            recipe.build_steps(),
            recipe.seed,
            torch.float32 if recipe.precision == "float32" else None,
            1 if all_tokens else experts.least,
        )

    def for_tokens(self, target: Target, tokens: int) -> Methods:
        """The methods for a matrix that has seen so many tokens: magnitude where they are too few.

        Masks that were given need no tokens, and stay as they are.
        """
        if tokens and (tokens >= self.least or not target.routed):
            return self
        steps = [(spec, step) for spec, step in self.steps if spec.name == ROUNDING]
        if isinstance(self.pruner, GivenMasks):
            return replace(self, steps=steps)
        magnitude: Pruner = registry.build("pruners", "magnitude", {})
        return replace(self, pruner=magnitude, pruner_name="magnitude", steps=steps)


def prune_matrix(
    target: Target, plan: MatrixPlan, stats: InputStats | None, methods: Methods, stored: Tensor
) -> Done:
    """Prune one matrix and run the steps that follow.

    Args:
        stats: of its inputs; None if no token has reached it.
        stored: its dense weight as the checkpoint stores it.

    Raises:
        RuntimeError: an algorithm that broke the pattern, made weights that are not finite, or moved a mask
            that it may not move.
    """
    started = time.monotonic()
    tokens = stats.count if stats is not None else 0
    methods = methods.for_tokens(target, tokens)
    job = Job(
        target.name,
        target.read(stored),
        stats or NO_TOKENS,
        plan.pattern,
        plan.sparsity,
        seeded(methods.seed, target.weight_name),
        target.routed,
    )
    pruned = methods.pruner.prune(job)
    check_promises(job, pruned, methods.pruner, None)
    steps = [(spec, step) for spec, step in methods.steps if spec.applies(target.name)]
    for _, step in steps:
        before, pruned = pruned, step.apply(job, pruned)
        check_promises(job, pruned, step, before)
    weight = pruned.weight.masked_fill(~pruned.keep, 0.0)  # a product with a mask leaves -0.0
    final = weight.to(stored.dtype)
    row = {
        "shape": list(plan.shape),
        "pattern": str(plan.pattern),
        "target_sparsity": plan.sparsity,
        **measured(job.weight, final.float(), stats),
        "pruner": methods.pruner_name,
        "steps": [spec.name for spec, _ in steps],
        **pruned.notes,
        **({"tokens": tokens} if target.routed or not tokens else {}),
        "seconds": round(time.monotonic() - started, 4),
    }
    scales = pruned.scales.cpu() if pruned.scales is not None else None
    return Done(weight.to(methods.dtype or stored.dtype).cpu(), pruned.keep, scales, row)


def seeded(seed: int, name: str) -> torch.Generator:
    """The generator of everything random about one matrix or block, the same in any order."""
    return torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")
    )


def measured(dense: Tensor, final: Tensor, stats: InputStats | None) -> Row:
    """What a row of the record says of a weight as stored, [R, C] in float32: its zeros and its error.

    Without inputs there is no error: it is None.
    """
    zeros = zeros_of(final)
    return {
        "sparsity": zeros / final.numel(),
        "zeros": zeros,
        "relative_error": relative_error(dense, final, stats) if stats is not None else None,
    }


def check_promises(job: Job, pruned: Pruned, algorithm: Pruner | Step, before: Pruned | None) -> None:
    """Raise `RuntimeError` where a step broke what it must keep.

    That is the pattern and the exact count of zeros, true zeros where the mask says so, finite weights, and,
    for an update of the weights, the mask.
    """
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
