"""Estimates of how long a run will take: the operations of every step, a few of them timed on this machine.

Right within a factor of about two on a machine that does nothing else. R outputs, C inputs, T tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from llmprune.contracts import Need
from llmprune.evaluation.requests import requests_of
from llmprune.machine import device as devices
from llmprune.model.skeleton import Skeleton
from llmprune.model.target import Target, by_expert
from llmprune.model.targets import targets_of
from llmprune.planning.needs import needs_dense, needs_of
from llmprune.recipe.types import Recipe
from llmprune.statistics.sums import SAMPLE_TOKENS

if TYPE_CHECKING:
    from llmprune.evaluation.scores import EvaluationSpec
    from llmprune.model.opening import Model
    from llmprune.planning.plan import Plan
    from llmprune.recipe.recovery import RecoveryRecipe

_EFFICIENCY = 0.5  # of a bare matrix product, reached by a block's forward pass
_STORAGE = 5e8  # bytes per second of reading, checking, writing and syncing a checkpoint
_MATRIX = 0.004  # seconds per matrix that no size explains
_TASKS = 0.5  # seconds to load the whole model and set lm-eval up, once per model
Shape = tuple[int, int]


@dataclass(frozen=True)
class Rates:
    """Operations per second of forward passes and of float32 products; seconds to visit an entry once."""

    forward: float
    exact: float
    visit: float


@functools.lru_cache
def rates_of(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measured once per process, in a fraction of a second."""
    forward, exact = (devices.matmul_rate(device, t) for t in (dtype, devices.DTYPES["float32"]))
    return Rates(forward * _EFFICIENCY, exact, devices.visit_seconds(device))


@functools.lru_cache
def _decomposition(device: torch.device, size: int) -> float:
    return devices.eigh_seconds(device, size)


def seconds_of(recipe: Recipe, model: Model, samples: int, length: int, allocated: bool = False) -> float:
    """Estimated seconds of pruning with a recipe on this machine, alone, with so many rows of so many tokens.

    `allocated`: what the allocator measures and tries is done already.
    """
    skeleton = model.skeleton
    total = sum(t.bytes for t in model.source.tensors.values()) / _STORAGE
    for name in skeleton.blocks:
        targets = targets_of(skeleton, name)
        total += _passes(recipe, skeleton, targets, samples, length, allocated)
        total += _pruning(recipe, skeleton, [t.shape for t in targets])
    return total + (0 if allocated else _gradients(recipe, skeleton, samples, length))


def _gradients(recipe: Recipe, skeleton: Skeleton, samples: int, length: int) -> float:
    """Of an allocator that looks at gradients: passes of all blocks and of the head, there and back, and the
    squares of each sequence's gradients.
    """
    allocator, rates = recipe.build_allocator(), rates_of(skeleton.device, skeleton.dtype)
    rows, tokens = min(samples, allocator.rows), min(length, allocator.length)
    blocks = [targets_of(skeleton, name) for name in skeleton.blocks]
    # A pass to the last block; then one more, and back for the gradients of inputs and of weights.
    passed = 4 * sum(_per_token(skeleton, targets, tokens) for targets in blocks)
    passed += 3 * 2 * skeleton.width * skeleton.vocabulary
    entries = sum(_size(target) for targets in blocks for target in targets)
    return rows * (tokens * passed / rates.forward + 3 * entries * rates.visit)


def _passes(
    recipe: Recipe, skeleton: Skeleton, targets: Sequence[Target], samples: int, length: int, allocated: bool
) -> float:
    """Forward passes of a block, those of tuning and of allocation too, and the statistics of its inputs."""
    rates, needs, allocator = (
        rates_of(skeleton.device, skeleton.dtype),
        needs_of(recipe),
        recipe.build_allocator(),
    )
    trials, dense = 0 if allocated else len(allocator.trials), needs_dense(recipe)
    measured = bool(allocator.needs) and not allocated
    # All tokens pass a block once for the statistics and once more as a whole. By groups they pass it once,
    # halting before each group; or, where the dense model runs beside, in parts that add up to two passes,
    # and once more. An allocator measures the dense model and prunes it once per trial with a cheap pruner.
    # Training costs three passes.
    each = 2 if recipe.order == "block" else 3 if dense else 1
    seen = each + dense * (each if Need.CROSS in needs else 1) + 2 * measured + 3 * trials
    trained = sum(step.trained for _, step in recipe.build_block_steps()) * length
    tokens = samples * length
    passes = (tokens * seen + 3 * trained) * _per_token(skeleton, targets, length) / rates.forward
    grams = (Need.GRAM in needs) + (Need.CROSS in needs) + trials
    inputs = _inputs(skeleton, [t.shape for t in targets])
    statistics = (
        2 * tokens * grams * sum(c * c for c in inputs) / rates.exact
        + 10 * tokens * sum(inputs) * rates.visit
    )
    return passes + statistics


def _pruning(recipe: Recipe, skeleton: Skeleton, shapes: Sequence[Shape]) -> float:
    """The pruner, its steps, and the checks of one block's matrices."""
    rates = rates_of(skeleton.device, skeleton.dtype)
    algorithms = [
        recipe.build_pruner(),
        *(s for _, s in recipe.build_steps()),
        *(s for _, s in recipe.build_block_steps()),
    ]
    entries = sum(r * c for r, c in shapes)
    squares, inputs = sum(r * c * c for r, c in shapes), _inputs(skeleton, shapes)
    # The relative error: two products with the Gram matrix, or two with a quarter of the sample.
    products = sum(a.products for a in algorithms) + (2 if Need.GRAM in needs_of(recipe) else 0)
    sampled = 0 if Need.GRAM in needs_of(recipe) else entries * SAMPLE_TOKENS
    operations = (
        2 * squares * products + sampled + 2 * sum(a.solves for a in algorithms) * sum(c**3 for c in inputs)
    )
    visits = entries * sum(a.visits for a in algorithms) * rates.visit
    decompositions = sum(a.decompositions for a in algorithms) * sum(
        _decomposition(skeleton.device, c) for c in inputs
    )
    return operations / rates.exact + visits + decompositions + _MATRIX * len(shapes)


def _inputs(skeleton: Skeleton, shapes: Sequence[Shape]) -> list[int]:
    """Widths of the distinct inputs of a block's matrices: q, k, v and gate, up share theirs."""
    return sorted({c for _, c in shapes}) + [skeleton.width] * 2


def _per_token(skeleton: Skeleton, targets: Sequence[Target], length: int) -> float:
    """Operations of one token in a block's forward pass, attention over `length` tokens included."""
    routed, experts = sum(_size(t) for t in targets if t.routed), len(by_expert(targets))
    # A token goes to few of the experts.
    chosen = getattr(skeleton.model.config.get_text_config(), "num_experts_per_tok", None) or 1
    entries = sum(map(_size, targets)) - routed * (1 - min(1.0, chosen / max(1, experts)))
    return 2 * entries + 4 * length * skeleton.width


def _size(target: Target) -> int:
    return target.shape[0] * target.shape[1]


def scoring_seconds(skeleton: Skeleton, sequences: Sequence[tuple[int, int]]) -> float:
    """Estimated seconds of one forward pass of a whole model over so many sequences of so many tokens."""
    rates, vocabulary = rates_of(skeleton.device, skeleton.dtype), skeleton.vocabulary
    blocks = [targets_of(skeleton, name) for name in skeleton.blocks]
    total = 0.0
    for count, length in sequences:
        operations = sum(_per_token(skeleton, targets, length) for targets in blocks)
        operations += 2 * skeleton.width * vocabulary
        total += count * length * (operations / rates.forward + 10 * vocabulary * rates.visit)
    return total


def training_seconds(
    skeleton: Skeleton, recipe: RecoveryRecipe, tokens: tuple[int, int, int], trained: int, beside: int
) -> float:
    """Estimated seconds of training a model in one process on this machine, alone; saving and scoring come on
    top.

    Args:
        skeleton: of the model.
        recipe: of recovery.
        tokens: that are trained on, in steps of so many, in sequences of so many.
        trained: numbers that the optimizer moves.
        beside: further forward passes of each token: of a teacher, or of activations computed twice.
    """
    count, step, length = tokens
    rates = rates_of(skeleton.device, skeleton.dtype)
    blocks = [targets_of(skeleton, name) for name in skeleton.blocks]
    forward = sum(_per_token(skeleton, targets, length) for targets in blocks)
    forward += 2 * skeleton.width * skeleton.vocabulary * (recipe.scope == "model")
    # A backward pass gives the gradients of inputs and of weights, each at the cost of a forward pass.
    whole = recipe.trainable.name != "norms"
    passes = 2 + whole + beside
    seconds = passes * forward / rates.forward * count
    entries = sum(_size(target) for targets in blocks for target in targets)
    # Every step makes the masked weight and its gradient, and the optimizer visits numbers and moments.
    visits = count / step * (8 * entries * whole + 16 * trained) * rates.visit
    tried = 1 + recipe.trial * len(recipe.rates)
    return (seconds + visits) * tried


def with_times(
    plan: Plan, recipe: Recipe, model: Model, evaluation: EvaluationSpec | None, processes: int
) -> Plan:
    """The plan with estimates of the seconds of pruning and, where the run does it, of scoring."""
    pruning = (
        seconds_of(recipe, model, plan.samples, plan.sequence_length, bool(plan.measures or plan.losses))
        / processes
    )
    if evaluation is None:
        return replace(plan, pruning_seconds=pruning)
    texts = [(len(rows), rows.shape[1]) for rows in evaluation.rows.values()]
    scoring = scoring_seconds(model.skeleton, texts) / processes
    requests = requests_of(evaluation.loaded, model.tokenizer, evaluation.limit) if evaluation.tasks else []
    if requests:
        scoring += scoring_seconds(model.skeleton, requests) + _TASKS
    return replace(
        plan, pruning_seconds=pruning, scoring_seconds=2 * scoring, tasks_counted=requests is not None
    )
