"""The plan before the work: every matrix with its pattern, sparsity and the rule that set it; memory, disk and tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from llmprune.checkpoint.reader import WeightSource
from llmprune.contracts import Need, Pattern
from llmprune.model.activations import micro_batch
from llmprune.model.skeleton import Skeleton
from llmprune.model.targets import find_targets
from llmprune.recipe import Recipe, rule_sparsity
from llmprune.stats import SAMPLE_TOKENS

_INTERPRETER = 600_000_000  # Python, torch and transformers once imported


@dataclass(frozen=True)
class MatrixPlan:
    """What will happen to one matrix, and why."""

    name: str
    shape: tuple[int, int]
    pattern: Pattern
    sparsity: float
    reason: str


@dataclass(frozen=True)
class Plan:
    """The whole run before it starts. Memory and disk in bytes."""

    matrices: Mapping[str, MatrixPlan]
    skipped: tuple[str, ...]
    samples: int
    sequence_length: int
    memory: int
    disk: int

    @property
    def weights(self) -> int:
        """Weights in the matrices to be pruned."""
        return sum(m.shape[0] * m.shape[1] for m in self.matrices.values())

    @property
    def sparsity(self) -> float:
        """Size-weighted target over the matrices to be pruned."""
        return sum(m.sparsity * m.shape[0] * m.shape[1] for m in self.matrices.values()) / max(1, self.weights)


def needs_of(recipe: Recipe) -> Need:
    """The statistics a run collects: the algorithms' needs, and a sample for the relative error where there is no Gram matrix."""
    refiner = recipe.build_refiner()
    needs = recipe.build_pruner().needs | (refiner.needs if refiner else Need.NONE)
    return needs if Need.GRAM in needs else needs | Need.SAMPLE


def make_plan(recipe: Recipe, skeleton: Skeleton, source: WeightSource, samples: int, length: int) -> Plan:
    """Assign a pattern and a sparsity to every matrix: rules first, the allocator for the rest.

    Raises:
        ValueError: in_features that a pattern's M does not divide, a rule that matches nothing, a stored dtype that cannot be pruned.
    """
    targets = [target for name, block in skeleton.blocks.items() for target in find_targets(name, block)]
    rules = {t.name: recipe.rule_for(t.name) for t in targets}
    for unused in set(recipe.rules) - set(rules.values()):
        raise ValueError(f"rule {unused.match!r} is the first match of no matrix; matrices are named like {targets[0].name!r}")
    pruned = [t for t in targets if not ((rule := rules[t.name]) and rule.skip)]
    fixed = {t.name: s for t in pruned if (rule := rules[t.name]) and (s := rule_sparsity(recipe, rule)) is not None}
    sizes = {t.name: t.shape[0] * t.shape[1] for t in pruned if t.name not in fixed}
    allocator = recipe.build_allocator()
    assert not allocator.needs, "a measuring pass comes with the first allocator that needs one"
    allocated = allocator.allocate({}, sizes, recipe.sparsity)
    matrices = {}
    for target in pruned:
        rule = rules[target.name]
        if source.tensors[skeleton.stored[target.weight_name]].dtype is None:
            raise ValueError(
                f"{target.weight_name} is stored in an integer or 8-bit type; prune the original checkpoint, not a quantised one"
            )
        reason = f"rule {rule.match!r}" if rule and (target.name in fixed or rule.pattern) else recipe.allocator.name
        sparsity = fixed.get(target.name, allocated.get(target.name, recipe.sparsity))
        matrices[target.name] = MatrixPlan(target.name, target.shape, recipe.pattern_for(rule), sparsity, reason)
    _check_widths(list(matrices.values()))
    if not matrices:
        raise ValueError("the rules skip every matrix; nothing would be pruned")
    skipped = tuple(t.name for t in targets if t.name not in matrices)
    memory = predict_memory(recipe, skeleton, source, matrices, samples, length)
    return Plan(matrices, skipped, samples, length, memory, predict_disk(source, matrices))


def _check_widths(matrices: list[MatrixPlan]) -> None:
    uneven = [m for m in matrices if m.shape[1] % m.pattern.width]
    if uneven:
        first = uneven[0]
        others = f" (and {len(uneven) - 1} more of {len(matrices)} matrices)" if len(uneven) > 1 else ""
        raise ValueError(
            f"{first.name}{others} has in_features {first.shape[1]}, not divisible by {first.pattern.width} as pattern {first.pattern} "
            f"requires; choose another M, or add rules to the recipe such as {{match: '*.{first.name.rpartition('.')[2]}', skip: true}}"
        )


def predict_disk(source: WeightSource, matrices: Mapping[str, MatrixPlan]) -> int:
    """Bytes the output needs: every tensor in its stored dtype, one bit per pruned matrix entry, and small files."""
    masks = sum(m.shape[0] * -(-m.shape[1] // 8) for m in matrices.values())
    return sum(t.bytes for t in source.tensors.values()) + masks + 10_000_000


def predict_memory(
    recipe: Recipe, skeleton: Skeleton, source: WeightSource, matrices: Mapping[str, MatrixPlan], samples: int, length: int
) -> int:
    """Peak resident bytes: one block (or the embeddings), its statistics, the block inputs, one micro-batch and a matrix at work."""
    item = torch.empty(0, dtype=skeleton.dtype).element_size()
    elements = {name: source.tensors[stored].elements for name, stored in skeleton.stored.items()}
    block = max(sum(elements[n] for n in skeleton.parameters_of(b)) for b in skeleton.blocks) * item
    outside = sum(elements[n] for n in skeleton.outside_blocks()) * item
    width: int = skeleton.model.config.get_text_config().hidden_size
    inner = max(m.shape[1] for m in matrices.values())
    needs = needs_of(recipe)
    inputs = {m.shape[1] for m in matrices.values()}
    statistics = sum(c * c * 4 * 3 if Need.GRAM in needs else SAMPLE_TOKENS * c * 4 * 2 for c in inputs)
    batch = min(samples, micro_batch(length, skeleton.device)) * length
    work = max(m.shape[0] * m.shape[1] for m in matrices.values()) * 4 * 6
    activations = samples * length * width * item + batch * (6 * inner + 8 * width) * item
    return _INTERPRETER + max(block + statistics + work, outside) + activations
