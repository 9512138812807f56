"""The plan of a run, made before the work: every matrix with pattern and sparsity; memory, disk and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from llmprune import registry
from llmprune.contracts import Measure, Pattern
from llmprune.machine import device as devices
from llmprune.model.skeleton import Skeleton
from llmprune.model.target import Target
from llmprune.model.targets import all_targets, left_dense, targets_of
from llmprune.patterns import NM
from llmprune.planning import needs
from llmprune.planning.allocation import balanced, rounded
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
class Resources:
    """What a run may use.

    Attributes:
        offload: where block inputs are kept: in `ram`, on `disk`, or `auto`: on disk where RAM is not enough.
        available: bytes of memory the machine has free.
        processes: how many processes share the samples and the machine.
    """

    offload: str = "auto"
    available: int = 1 << 62
    processes: int = 1


class Findings(NamedTuple):
    """What the allocator found out before it decides: measures by block, held-out losses by trial number."""

    measures: Mapping[int, Measure] = {}
    losses: Mapping[int, float] = {}


NOTHING_FOUND = Findings()


@dataclass(frozen=True)
class Plan:
    """The whole run before it starts. Memory and disk in bytes; memory per process.

    Attributes:
        skipped: matrices that rules leave out. dense: what else stays dense, beside embeddings and head.
        memory: peak of private resident memory while pruning.
        device_memory: the same on the GPU, None on a CPU.
        disk: what the output takes (`with_output` adds it), and what lies beside it while it is made.
        available: free memory of the machine, per process.
        offload: where the block inputs are kept, `ram` or `disk`.
        pausing: whether forward passes halt at each group of matrices (`order: group`). Otherwise the part
            of the block before a group is computed again for it.
        measures, losses: what the allocator found out, by block and by trial. seconds: how long that took.
        scoring, device_scoring: peak memory while the model is scored; 0 and None where it is not.
        pruning_seconds, scoring_seconds: estimates, the second of the dense and the pruned model together;
            None where nothing is estimated or scored.
        tasks_counted: whether `scoring_seconds` counts every task.
        remarks: what the user should know before the run begins.
    """

    matrices: Mapping[str, MatrixPlan]
    skipped: tuple[str, ...]
    dense: tuple[str, ...]
    samples: int
    sequence_length: int
    memory: int
    device_memory: int | None
    disk: int
    available: int
    offload: str
    pausing: bool
    measures: Mapping[int, Measure] = field(default_factory=dict)
    losses: Mapping[int, float] = field(default_factory=dict)
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
        """Target sparsity over the matrices to be pruned, weighted by their sizes."""
        removed = sum(m.sparsity * m.shape[0] * m.shape[1] for m in self.matrices.values())
        return removed / max(1, self.weights)


def check_offload(offload: str) -> None:
    """Raise `ValueError` for a place of the block inputs that does not exist."""
    if offload not in OFFLOADS:
        raise ValueError(f"offload must be one of {', '.join(OFFLOADS)}, got {offload!r}")


def make_plan(
    recipe: Recipe,
    skeleton: Skeleton,
    samples: int,
    length: int,
    resources: Resources = Resources(),
    findings: Findings = NOTHING_FOUND,
) -> Plan:
    """Plan a run with a recipe on so many calibration samples of so many tokens; without its output's disk.

    Raises:
        ValueError: in_features that a pattern's M does not divide, a rule that matches nothing, a stored
            dtype that cannot be pruned.
    """
    matrices, skipped = _matrices(recipe, skeleton, findings)
    shapes = {name: matrix.shape for name, matrix in matrices.items()}
    processes, available = resources.processes, resources.available
    host, device = needs.predict_memory(recipe, skeleton, shapes, samples, length, processes)
    streams = 2 if needs.needs_dense(recipe) else 1  # block inputs of the pruned and of the dense model
    activations = needs.activation_bytes(skeleton, samples, length) * streams
    activations = max(activations, needs.measuring_bytes(recipe, skeleton, samples, length))
    share = -(-activations // processes)
    offload = resources.offload
    if offload == "auto":
        offload = "disk" if (host + share) * processes > available else "ram"
    in_ram = share if offload == "ram" else 0
    halted = _halted_bytes(recipe, skeleton, shapes, -(-samples // processes) * length)
    if device is None:
        free = available // processes - host - in_ram
    else:
        free = devices.free_memory(skeleton.device) - device if halted is not None else 0
    pausing = halted is not None and halted <= free
    if pausing and halted is not None:
        host, device = (host + halted, None) if device is None else (host, device + halted)
    disk = needs.exact_bytes(recipe, skeleton, shapes)
    if offload == "disk":
        disk += activations
    return Plan(
        matrices=matrices,
        skipped=skipped,
        dense=left_dense(skeleton),
        samples=samples,
        sequence_length=length,
        memory=host + in_ram,
        device_memory=device,
        disk=disk,
        available=available // processes,
        offload=offload,
        pausing=pausing,
        measures=findings.measures,
        losses=findings.losses,
    )


def _halted_bytes(
    recipe: Recipe, skeleton: Skeleton, shapes: Mapping[str, tuple[int, int]], tokens: int
) -> int | None:
    """What forward passes hold that halt at each group of matrices; None where they cannot halt."""
    # Attention computed without a kernel of its own holds [heads, T, T] per sequence: too much to keep.
    attention = getattr(skeleton.model.config, "_attn_implementation", "eager")
    if recipe.order != "group" or needs.needs_dense(recipe) or attention == "eager":
        return None
    return needs.halted_bytes(skeleton, shapes, tokens)


def _matrices(
    recipe: Recipe, skeleton: Skeleton, findings: Findings
) -> tuple[dict[str, MatrixPlan], tuple[str, ...]]:
    """The matrices to be pruned, each with its pattern and sparsity: rules first, the allocator for the rest.

    The second value: the names of the matrices that rules skip.
    """
    targets = all_targets(skeleton)
    rules = {t.name: recipe.rule_for(t.name) for t in targets}
    for unused in set(recipe.rules) - set(rules.values()):
        raise ValueError(
            f"rule {unused.match!r} is the first match of no matrix; "
            f"matrices are named like {targets[0].name!r}"
        )
    pruned = [t for t in targets if not ((rule := rules[t.name]) and rule.skip)]
    fixed: dict[str, float] = {}
    for target in pruned:
        rule = rules[target.name]
        sparsity = rule_sparsity(recipe, rule) if rule else None
        if sparsity is not None:
            fixed[target.name] = sparsity
    free = {t.name: t.shape for t in pruned if t.name not in fixed}
    allocated = _allocated(recipe, free, _block_numbers(skeleton), findings, rules)
    matrices = {}
    for target in pruned:
        check_stored_dtype(target, skeleton)
        rule = rules[target.name]
        ruled = rule and (target.name in fixed or rule.pattern)
        reason = f"rule {rule.match!r}" if rule and ruled else recipe.allocator.name
        own = recipe.pattern_for(rule), fixed.get(target.name, recipe.sparsity)
        pattern, sparsity = allocated.get(target.name, own)
        matrices[target.name] = MatrixPlan(target.name, target.shape, pattern, sparsity, reason)
    check_widths(list(matrices.values()))
    if not matrices:
        raise ValueError("the rules skip every matrix; nothing would be pruned")
    if recipe.permute and not any(isinstance(m.pattern, NM) for m in matrices.values()):
        raise ValueError(
            f"permute reorders channels for N:M patterns, and the pattern is {recipe.pattern}; "
            "leave it out or choose N:M"
        )
    return matrices, tuple(t.name for t in targets if t.name not in matrices)


def _block_numbers(skeleton: Skeleton) -> dict[str, int]:
    """The number of the block of every matrix, by the matrix's name."""
    blocks = enumerate(skeleton.blocks)
    return {t.name: number for number, name in blocks for t in targets_of(skeleton, name)}


def check_stored_dtype(target: Target, skeleton: Skeleton) -> None:
    """Raise `ValueError` for a matrix whose stored type cannot be pruned."""
    if skeleton.source.tensors[target.tensor].dtype is None:
        raise ValueError(
            f"{target.tensor} is stored in an integer or 8-bit type; prune the original checkpoint, "
            "not a quantised one"
        )


def with_scoring(plan: Plan, skeleton: Skeleton, texts: Sequence[tuple[int, int]], tasks: bool) -> Plan:
    """The plan of a run that also scores the model: texts as (windows, tokens), and whether it has tasks."""
    host, device = needs.predict_scoring(skeleton, texts, tasks)
    tokens = sum(8 * windows * length for windows, length in texts)  # held from the plan to the end
    memory = plan.memory + tasks * needs.LM_EVAL + tokens
    return replace(plan, memory=memory, scoring=host + tokens, device_scoring=device)


def _allocated(
    recipe: Recipe,
    shapes: Mapping[str, tuple[int, int]],
    blocks: Mapping[str, int],
    findings: Findings,
    rules: Mapping[str, Rule | None],
) -> dict[str, tuple[Pattern, float]]:
    """Pattern and sparsity of the matrices that no rule has fixed.

    Their overall sparsity is that of the recipe, to the weight where the patterns' units allow it.
    """
    if not shapes:
        return {}
    asked = {name: recipe.pattern_for(rules[name]) for name in shapes}
    losses = findings.losses
    trial = min(losses, key=lambda number: losses[number]) if losses else 0
    allocator = recipe.build_allocator()
    if allocator.measures and not findings.measures:  # a draft, or nothing can be measured
        allocator = registry.build("allocators", "uniform", {})
    wishes = allocator.allocate(shapes, blocks, findings.measures, recipe.sparsity, trial)
    if all(wish == recipe.sparsity for wish in wishes.values()):
        return {name: (asked[name], recipe.sparsity) for name in shapes}
    check_widths([MatrixPlan(name, shapes[name], asked[name], 0.0, "") for name in shapes])
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    grouped = {name for name in shapes if asked[name].width > 1}
    units = {}  # what a matrix can lose one more of: a column of every group, a weight of every row, a weight
    for name, (rows, _) in shapes.items():
        single = rows if recipe.row_scope else 1
        units[name] = sizes[name] // asked[name].width if name in grouped else single
    shares = balanced(wishes, sizes, recipe.sparsity)
    total = int(recipe.sparsity * sum(sizes.values()) + 1e-6)
    counts = rounded(shares, sizes, units, total, at_least=1 if grouped else 0)
    found: dict[str, tuple[Pattern, float]] = {}
    for name, count in counts.items():
        if name in grouped:
            width = asked[name].width
            found[name] = NM(width - count, width), count / width
        else:
            # A quarter of a unit on top: rounded either way, the product with the size gives this count.
            found[name] = asked[name], (count + 0.25) * units[name] / sizes[name] if count else 0.0
    return found


def check_widths(matrices: Sequence[MatrixPlan]) -> None:
    """Raise `ValueError` for a matrix whose columns are no whole groups of its pattern."""
    uneven = [m for m in matrices if m.shape[1] % m.pattern.width]
    if uneven:
        first = uneven[0]
        others = f" (and {len(uneven) - 1} more of {len(matrices)} matrices)" if len(uneven) > 1 else ""
        raise ValueError(
            f"{first.name}{others} has in_features {first.shape[1]}, not divisible by {first.pattern.width} "
            f"as pattern {first.pattern} requires; choose another M, or add rules to the recipe such as "
            f"{{match: '*.{first.name.rpartition('.')[2]}', skip: true}}"
        )
