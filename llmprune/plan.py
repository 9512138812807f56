"""The plan before the work: every matrix with its pattern, sparsity and the rule that set it; memory, disk and tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmprune import device as devices
from llmprune import registry
from llmprune.allocation import balanced, rounded
from llmprune.checkpoint.reader import WeightSource
from llmprune.contracts import Need, Pattern
from llmprune.model.activations import micro_batch
from llmprune.model.skeleton import Skeleton
from llmprune.model.targets import find_targets
from llmprune.patterns import NM
from llmprune.recipe import Recipe, Rule, rule_sparsity
from llmprune.stats import SAMPLE_TOKENS

_INTERPRETER = 450_000_000  # private memory of Python, torch and transformers once imported
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
        available: what the machine has free. offload: where the block inputs are kept, `ram` or `disk`.
        pausing: whether forward passes halt at each group of matrices (`order: group`); else what comes before it is computed again.
        measures: what the allocator measured, by block. losses: of its trials, by their number. seconds: how long both took.
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
    needs = recipe.build_pruner().needs
    for _, step in recipe.build_steps():
        needs |= step.needs
    return needs if Need.GRAM in needs else needs | Need.SAMPLE


def needs_dense(recipe: Recipe) -> bool:
    """Whether the dense model's stream of block inputs must run beside the pruned one."""
    return bool(recipe.build_block_steps()) or Need.CROSS in needs_of(recipe)


def make_plan(
    recipe: Recipe, skeleton: Skeleton, source: WeightSource, samples: int, length: int, *, offload: str = "auto",
    available: int = 1 << 62, processes: int = 1, measures: Mapping[int, float] | None = None, losses: Mapping[int, float] | None = None,
) -> Plan:  # fmt: skip
    """Assign a pattern and a sparsity to every matrix: rules first, the allocator for the rest.

    Args:
        offload: keep block inputs in `ram`, on `disk`, or `auto`: on disk where RAM would not be enough.
        measures: what the allocator measured of each block. losses: of its trials; the lowest decides.
        available: bytes of memory the machine has free.
        processes: how many share samples and machine.

    Raises:
        ValueError: in_features that a pattern's M does not divide, a rule that matches nothing, a stored dtype that cannot be pruned.
    """
    if offload not in OFFLOADS:
        raise ValueError(f"offload must be one of {', '.join(OFFLOADS)}, got {offload!r}")
    targets = [target for name, block in skeleton.blocks.items() for target in find_targets(name, block)]
    rules = {t.name: recipe.rule_for(t.name) for t in targets}
    for unused in set(recipe.rules) - set(rules.values()):
        raise ValueError(f"rule {unused.match!r} is the first match of no matrix; matrices are named like {targets[0].name!r}")
    pruned = [t for t in targets if not ((rule := rules[t.name]) and rule.skip)]
    fixed = {t.name: s for t in pruned if (rule := rules[t.name]) and (s := rule_sparsity(recipe, rule)) is not None}
    blocks = {t.name: number for number, (name, block) in enumerate(skeleton.blocks.items()) for t in find_targets(name, block)}
    allocated = _allocated(recipe, {t.name: t.shape for t in pruned if t.name not in fixed}, blocks, measures or {}, losses or {}, rules)
    matrices = {}
    for target in pruned:
        rule = rules[target.name]
        if source.tensors[skeleton.stored[target.weight_name]].dtype is None:
            raise ValueError(
                f"{target.weight_name} is stored in an integer or 8-bit type; prune the original checkpoint, not a quantised one"
            )
        reason = f"rule {rule.match!r}" if rule and (target.name in fixed or rule.pattern) else recipe.allocator.name
        pattern, sparsity = allocated.get(target.name, (recipe.pattern_for(rule), fixed.get(target.name, recipe.sparsity)))
        matrices[target.name] = MatrixPlan(target.name, target.shape, pattern, sparsity, reason)
    _check_widths(list(matrices.values()))
    if not matrices:
        raise ValueError("the rules skip every matrix; nothing would be pruned")
    if recipe.permute and not any(isinstance(m.pattern, NM) for m in matrices.values()):
        raise ValueError(f"permute reorders channels for N:M patterns, and the pattern is {recipe.pattern}; leave it out or choose N:M")
    skipped = tuple(t.name for t in targets if t.name not in matrices)
    host, device = predict_memory(recipe, skeleton, source, matrices, samples, length, processes)
    activations = activation_bytes(skeleton, samples, length) * (2 if needs_dense(recipe) else 1)
    share = -(-activations // processes)
    if offload == "auto":
        offload = "disk" if (host + share) * processes > available else "ram"
    # Attention computed without a kernel of its own holds [heads, T, T] per sequence: too much to keep.
    attention = getattr(skeleton.model.config, "_attn_implementation", "eager")
    pausing = recipe.order == "group" and not needs_dense(recipe) and attention != "eager"
    if pausing:
        halted = _halted_bytes(skeleton, matrices, -(-samples // processes) * length)
        free = (
            available // processes - host - (share if offload == "ram" else 0)
            if device is None
            else devices.free_memory(skeleton.device) - device
        )
        pausing = halted <= free
        host, device = host + halted * (pausing and device is None), device and device + halted * pausing
    disk = predict_disk(source, matrices) + (activations if offload == "disk" else 0)
    memory = host + (share if offload == "ram" else 0)
    return Plan(
        matrices, skipped, samples, length, memory, device, disk, available // processes, offload, pausing, measures or {}, losses or {}
    )


def _allocated(
    recipe: Recipe, shapes: Mapping[str, tuple[int, int]], blocks: Mapping[str, int], measures: Mapping[int, float],
    losses: Mapping[int, float], rules: Mapping[str, Rule | None],
) -> dict[str, tuple[Pattern, float]]:  # fmt: skip
    """Pattern and sparsity of the matrices no rule has fixed; their total is that of the recipe, to the weight where units allow it."""
    if not shapes:
        return {}
    asked = {n: recipe.pattern_for(rules[n]) for n in shapes}
    allocator, trial = recipe.build_allocator(), min(losses, key=lambda number: losses[number]) if losses else 0
    if allocator.needs and not measures:  # an estimate before anything was measured
        allocator = registry.build("allocators", "uniform", {})
    wishes = allocator.allocate(shapes, blocks, measures, recipe.sparsity, trial)
    if all(wish == recipe.sparsity for wish in wishes.values()):
        return {n: (asked[n], recipe.sparsity) for n in shapes}
    sizes = {n: r * c for n, (r, c) in shapes.items()}
    _check_widths([MatrixPlan(n, shapes[n], asked[n], 0.0, "") for n in shapes])
    grouped = {n for n in shapes if asked[n].width > 1}
    units = {n: sizes[n] // asked[n].width if n in grouped else shapes[n][0] if recipe.row_scope else 1 for n in shapes}
    shares = balanced(wishes, sizes, recipe.sparsity)
    counts = rounded(shares, sizes, units, int(recipe.sparsity * sum(sizes.values()) + 1e-6), at_least=1 if grouped else 0)
    # A quarter of a unit on top: the count must come out of the product with the sparsity, whatever that is rounded to.
    return {
        n: (NM(asked[n].width - counts[n], asked[n].width), counts[n] / asked[n].width) if n in grouped
        else (asked[n], (counts[n] + 0.25) * units[n] / sizes[n] if counts[n] else 0.0)
        for n in shapes
    }  # fmt: skip


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


def activation_bytes(skeleton: Skeleton, samples: int, length: int) -> int:
    """Bytes of the block inputs of all samples."""
    width: int = skeleton.model.config.get_text_config().hidden_size
    return samples * length * width * skeleton.dtype.itemsize


def _halted_bytes(skeleton: Skeleton, matrices: Mapping[str, MatrixPlan], tokens: int) -> int:
    """Bytes that forward passes hold which halted within a block: the widest input; q, k, v before and after their rotation."""
    width: int = skeleton.model.config.get_text_config().hidden_size
    return tokens * (max(m.shape[1] for m in matrices.values()) + 8 * width) * skeleton.dtype.itemsize


def predict_memory(
    recipe: Recipe, skeleton: Skeleton, source: WeightSource, matrices: Mapping[str, MatrixPlan], samples: int, length: int, processes: int
) -> tuple[int, int | None]:  # fmt: skip
    """Peak private bytes of a process on the host and on the GPU (None: there is none), without the block inputs of all samples.

    At work on a matrix there are: one block as stored, the next one read ahead, a copy in the compute dtype where that is another, the
    statistics, and what the pruner needs for the largest matrix. Before that, embeddings and one micro-batch.
    """
    item, on_gpu = skeleton.dtype.itemsize, skeleton.device.type != "cpu"
    stored = {name: source.tensors[where] for name, where in skeleton.stored.items()}
    blocks = {b: skeleton.parameters_of(b) for b in skeleton.blocks}
    block = max(sum(stored[n].bytes for n in names) for names in blocks.values())
    kept_twice = on_gpu or any(stored[n].dtype != skeleton.dtype for names in blocks.values() for n in names)
    compute = max(sum(stored[n].elements for n in names) for names in blocks.values()) * item if kept_twice else 0
    outside = sum(stored[n].elements * item + stored[n].bytes * kept_twice for n in skeleton.outside_blocks())
    elements = max(sum(stored[n].elements for n in names) for names in blocks.values())
    originals = elements * item if needs_dense(recipe) else 0  # the dense block stays beside the one being pruned
    work = compute + originals + _statistics_bytes(recipe, matrices)
    batch = min(-(-samples // processes), micro_batch(length, skeleton.device)) * length
    inner, width = max(m.shape[1] for m in matrices.values()), skeleton.model.config.get_text_config().hidden_size
    passing = batch * (6 * inner + 8 * width) * item
    # In float32: weights, masks, a run of AdamW (weights, gradients, two moments) and another at rest, which waits for the comparison of
    # their rates; the weights as computed with; and what the backward pass goes back over.
    tuning = elements * (9 * 4 + item) + 4 * passing if recipe.build_block_steps() else 0
    work += max(_pruning_bytes(recipe, matrices), tuning)
    if on_gpu:
        return _INTERPRETER + max(3 * block, outside), max(work, outside, compute + passing)
    return _INTERPRETER + max(2 * block + work, 3 * block + compute + passing, outside), None


def _statistics_bytes(recipe: Recipe, matrices: Mapping[str, MatrixPlan]) -> int:
    """All statistics of one block: as many distinct inputs as its matrices have input groups."""
    needs, widths = needs_of(recipe), {name.rpartition(".")[2]: m.shape[1] for name, m in matrices.items()}
    groups = sorted(widths.values(), reverse=True)[: max(1, -(-len(widths) * 4 // 7))]  # q, k, v and gate, up share theirs
    squares = (Need.GRAM in needs) + (Need.CROSS in needs)
    return sum(4 * c * c * squares if squares else SAMPLE_TOKENS * 4 * c for c in groups)


def _pruning_bytes(recipe: Recipe, matrices: Mapping[str, MatrixPlan]) -> int:
    """What a pruner and its steps hold of the largest matrix [R, C]: weight, score, mask, result; Gram solvers some [C, C] more."""
    rows, columns = max((m.shape for m in matrices.values()), key=lambda shape: shape[0] * shape[1])
    algorithms = [recipe.build_pruner(), *(step for _, step in recipe.build_steps())]
    grams = max(a.gram_copies for a in algorithms) if Need.GRAM in needs_of(recipe) else 0
    widest = max(m.shape[1] for m in matrices.values())
    return 4 * (rows * columns * max(a.copies for a in algorithms) + widest**2 * grams)
