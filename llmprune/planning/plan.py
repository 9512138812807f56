"""The plan before the work: every matrix with its pattern, sparsity and the rule that set it; memory, disk and tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from llmprune import registry
from llmprune.checkpoint.reader import WeightSource
from llmprune.contracts import Pattern
from llmprune.machine import device as devices
from llmprune.model.skeleton import Skeleton
from llmprune.model.targets import find_targets
from llmprune.patterns import NM
from llmprune.planning.allocation import balanced, rounded
from llmprune.planning.needs import (
    LM_EVAL,
    activation_bytes,
    halted_bytes,
    needs_dense,
    predict_disk,
    predict_memory,
    predict_scoring,
)
from llmprune.recipe.types import Recipe, Rule, rule_sparsity

OFFLOADS = ("auto", "ram", "disk")


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
    """The whole run before it starts. Memory and disk in bytes; memory per process.

    Attributes:
        memory: peak of private resident memory while pruning. device_memory: the same on the GPU, None on a CPU.
        scoring, device_scoring: the same while the model is scored; 0 where it is not.
        available: what the machine has free. offload: where the block inputs are kept, `ram` or `disk`.
        pausing: whether forward passes halt at each group of matrices (`order: group`); else what comes before it is computed again.
        measures: what the allocator measured, by block. losses: of its trials, by their number. seconds: how long both took.
        pruning_seconds, scoring_seconds: estimates, of dense and pruned scores together; None where nothing is estimated or scored.
        tasks_counted: whether `scoring_seconds` counts every task. remarks: what the user should know before it begins.
    """

    matrices: Mapping[str, MatrixPlan]
    skipped: tuple[str, ...]
    samples: int
    sequence_length: int
    memory: int
    device_memory: int | None
    disk: int
    available: int
    offload: str
    pausing: bool
    measures: Mapping[int, float]
    losses: Mapping[int, float]
    seconds: float = 0.0
    scoring: int = 0
    device_scoring: int | None = None
    pruning_seconds: float | None = None
    scoring_seconds: float | None = None
    tasks_counted: bool = True
    remarks: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """Weights in the matrices to be pruned."""
        return sum(m.shape[0] * m.shape[1] for m in self.matrices.values())

    @property
    def sparsity(self) -> float:
        """Size-weighted target over the matrices to be pruned."""
        return sum(m.sparsity * m.shape[0] * m.shape[1] for m in self.matrices.values()) / max(
            1, self.weights
        )


def check_offload(offload: str) -> None:
    """Raise `ValueError` for a place of the block inputs that does not exist."""
    if offload not in OFFLOADS:
        raise ValueError(f"offload must be one of {', '.join(OFFLOADS)}, got {offload!r}")


def make_plan(
    recipe: Recipe,
    skeleton: Skeleton,
    source: WeightSource,
    samples: int,
    length: int,
    *,
    offload: str = "auto",
    available: int = 1 << 62,
    processes: int = 1,
    measures: Mapping[int, float] | None = None,
    losses: Mapping[int, float] | None = None,
) -> Plan:
    """Assign a pattern and a sparsity to every matrix: rules first, the allocator for the rest.

    Args:
        offload: keep block inputs in `ram`, on `disk`, or `auto`: on disk where RAM would not be enough.
        measures: what the allocator measured of each block. losses: of its trials; the lowest decides.
        available: bytes of memory the machine has free.
        processes: how many share samples and machine.

    Raises:
        ValueError: in_features that a pattern's M does not divide, a rule that matches nothing, a stored dtype that cannot be pruned.
    """
    targets = [target for name, block in skeleton.blocks.items() for target in find_targets(name, block)]
    rules = {t.name: recipe.rule_for(t.name) for t in targets}
    for unused in set(recipe.rules) - set(rules.values()):
        raise ValueError(
            f"rule {unused.match!r} is the first match of no matrix; matrices are named like {targets[0].name!r}"
        )
    pruned = [t for t in targets if not ((rule := rules[t.name]) and rule.skip)]
    fixed = {
        t.name: s
        for t in pruned
        if (rule := rules[t.name]) and (s := rule_sparsity(recipe, rule)) is not None
    }
    blocks = {
        t.name: number
        for number, (name, block) in enumerate(skeleton.blocks.items())
        for t in find_targets(name, block)
    }
    allocated = _allocated(
        recipe,
        {t.name: t.shape for t in pruned if t.name not in fixed},
        blocks,
        measures or {},
        losses or {},
        rules,
    )
    matrices = {}
    for target in pruned:
        rule = rules[target.name]
        if source.tensors[skeleton.stored[target.weight_name]].dtype is None:
            raise ValueError(
                f"{target.weight_name} is stored in an integer or 8-bit type; prune the original checkpoint, not a quantised one"
            )
        reason = (
            f"rule {rule.match!r}"
            if rule and (target.name in fixed or rule.pattern)
            else recipe.allocator.name
        )
        pattern, sparsity = allocated.get(
            target.name, (recipe.pattern_for(rule), fixed.get(target.name, recipe.sparsity))
        )
        matrices[target.name] = MatrixPlan(target.name, target.shape, pattern, sparsity, reason)
    _check_widths(list(matrices.values()))
    if not matrices:
        raise ValueError("the rules skip every matrix; nothing would be pruned")
    if recipe.permute and not any(isinstance(m.pattern, NM) for m in matrices.values()):
        raise ValueError(
            f"permute reorders channels for N:M patterns, and the pattern is {recipe.pattern}; leave it out or choose N:M"
        )
    skipped = tuple(t.name for t in targets if t.name not in matrices)
    shapes = {name: m.shape for name, m in matrices.items()}
    host, device = predict_memory(recipe, skeleton, source, shapes, samples, length, processes)
    activations = activation_bytes(skeleton, samples, length) * (2 if needs_dense(recipe) else 1)
    share = -(-activations // processes)
    if offload == "auto":
        offload = "disk" if (host + share) * processes > available else "ram"
    # Attention computed without a kernel of its own holds [heads, T, T] per sequence: too much to keep.
    attention = getattr(skeleton.model.config, "_attn_implementation", "eager")
    pausing = recipe.order == "group" and not needs_dense(recipe) and attention != "eager"
    if pausing:
        halted = halted_bytes(skeleton, shapes, -(-samples // processes) * length)
        free = (
            available // processes - host - (share if offload == "ram" else 0)
            if device is None
            else devices.free_memory(skeleton.device) - device
        )
        pausing = halted <= free
        host, device = host + halted * (pausing and device is None), device and device + halted * pausing
    disk = predict_disk(source, shapes) + (activations if offload == "disk" else 0)
    memory = host + (share if offload == "ram" else 0)
    return Plan(
        matrices,
        skipped,
        samples,
        length,
        memory,
        device,
        disk,
        available // processes,
        offload,
        pausing,
        measures or {},
        losses or {},
    )


def with_scoring(
    plan: Plan, skeleton: Skeleton, source: WeightSource, texts: Sequence[tuple[int, int]], tasks: bool
) -> Plan:
    """The plan of a run that scores the model too: texts as (windows, tokens), and whether tasks are among them."""
    host, device = predict_scoring(skeleton, source, texts, tasks)
    tokens = sum(8 * windows * length for windows, length in texts)  # held from the plan to the end
    return replace(
        plan, memory=plan.memory + tasks * LM_EVAL + tokens, scoring=host + tokens, device_scoring=device
    )


def _allocated(
    recipe: Recipe,
    shapes: Mapping[str, tuple[int, int]],
    blocks: Mapping[str, int],
    measures: Mapping[int, float],
    losses: Mapping[int, float],
    rules: Mapping[str, Rule | None],
) -> dict[str, tuple[Pattern, float]]:
    """Pattern and sparsity of the matrices no rule has fixed; their total is that of the recipe, to the weight where units allow it."""
    if not shapes:
        return {}
    asked = {n: recipe.pattern_for(rules[n]) for n in shapes}
    allocator, trial = (
        recipe.build_allocator(),
        min(losses, key=lambda number: losses[number]) if losses else 0,
    )
    if allocator.needs and not measures:  # an estimate before anything was measured
        allocator = registry.build("allocators", "uniform", {})
    wishes = allocator.allocate(shapes, blocks, measures, recipe.sparsity, trial)
    if all(wish == recipe.sparsity for wish in wishes.values()):
        return {n: (asked[n], recipe.sparsity) for n in shapes}
    sizes = {n: r * c for n, (r, c) in shapes.items()}
    _check_widths([MatrixPlan(n, shapes[n], asked[n], 0.0, "") for n in shapes])
    grouped = {n for n in shapes if asked[n].width > 1}
    units = {
        n: sizes[n] // asked[n].width if n in grouped else shapes[n][0] if recipe.row_scope else 1
        for n in shapes
    }
    shares = balanced(wishes, sizes, recipe.sparsity)
    counts = rounded(
        shares, sizes, units, int(recipe.sparsity * sum(sizes.values()) + 1e-6), at_least=1 if grouped else 0
    )
    # A quarter of a unit on top: the count must come out of the product with the sparsity, whatever that is rounded to.
    return {
        n: (NM(asked[n].width - counts[n], asked[n].width), counts[n] / asked[n].width)
        if n in grouped
        else (asked[n], (counts[n] + 0.25) * units[n] / sizes[n] if counts[n] else 0.0)
        for n in shapes
    }


def _check_widths(matrices: list[MatrixPlan]) -> None:
    uneven = [m for m in matrices if m.shape[1] % m.pattern.width]
    if uneven:
        first = uneven[0]
        others = f" (and {len(uneven) - 1} more of {len(matrices)} matrices)" if len(uneven) > 1 else ""
        raise ValueError(
            f"{first.name}{others} has in_features {first.shape[1]}, not divisible by {first.pattern.width} as pattern {first.pattern} "
            f"requires; choose another M, or add rules to the recipe such as {{match: '*.{first.name.rpartition('.')[2]}', skip: true}}"
        )
