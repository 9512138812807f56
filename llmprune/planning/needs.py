"""What a run needs, before it starts: statistics; on paper, memory and disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from llmprune.checkpoint.reader import WeightSource
from llmprune.contracts import Need
from llmprune.evaluation.perplexity import STORE_BYTES
from llmprune.evaluation.zeroshot import BATCH
from llmprune.model.activations import micro_batch
from llmprune.model.skeleton import Skeleton
from llmprune.recipe.types import Recipe
from llmprune.statistics.sums import SAMPLE_TOKENS

LM_EVAL = 170_000_000  # private memory of lm-eval and what it imports; it stays until the process ends
_INTERPRETER = 450_000_000  # the same of Python, torch and transformers
_REQUEST = 128  # tokens of the longest requests of most zero-shot tasks


def needs_of(recipe: Recipe) -> Need:
    """The statistics a run collects: the algorithms' needs, and a sample for the relative error where there is no Gram matrix."""
    needs = recipe.build_pruner().needs
    for _, step in recipe.build_steps():
        needs |= step.needs
    return needs if Need.GRAM in needs else needs | Need.SAMPLE


def needs_dense(recipe: Recipe) -> bool:
    """Whether the dense model's stream of block inputs must run beside the pruned one."""
    return bool(recipe.build_block_steps()) or Need.CROSS in needs_of(recipe)


def predict_disk(source: WeightSource, shapes: Mapping[str, tuple[int, int]]) -> int:
    """Bytes the output needs: every tensor in its stored dtype, one bit per pruned matrix entry, and small files."""
    masks = sum(rows * -(-columns // 8) for rows, columns in shapes.values())
    return sum(t.bytes for t in source.tensors.values()) + masks + 10_000_000


def activation_bytes(skeleton: Skeleton, samples: int, length: int) -> int:
    """Bytes of the block inputs of all samples."""
    width: int = skeleton.model.config.get_text_config().hidden_size
    return samples * length * width * skeleton.dtype.itemsize


def halted_bytes(skeleton: Skeleton, shapes: Mapping[str, tuple[int, int]], tokens: int) -> int:
    """Bytes that forward passes hold which halted within a block: the widest input; q, k, v before and after their rotation."""
    width: int = skeleton.model.config.get_text_config().hidden_size
    return tokens * (max(columns for _, columns in shapes.values()) + 8 * width) * skeleton.dtype.itemsize


def predict_memory(
    recipe: Recipe,
    skeleton: Skeleton,
    source: WeightSource,
    shapes: Mapping[str, tuple[int, int]],
    samples: int,
    length: int,
    processes: int,
) -> tuple[int, int | None]:
    """Peak private bytes of a process on the host and on the GPU (None: there is none), without the block inputs of all samples.

    At work on a matrix there are: one block as stored, the next one read ahead, a copy in the compute dtype where that is another, the
    statistics, and what the pruner needs for the largest matrix. Before that, embeddings and one micro-batch.
    """
    item, on_gpu = skeleton.dtype.itemsize, skeleton.device.type != "cpu"
    stored = {name: source.tensors[where] for name, where in skeleton.stored.items()}
    blocks = {b: skeleton.parameters_of(b) for b in skeleton.blocks}
    block = max(sum(stored[n].bytes for n in names) for names in blocks.values())
    kept_twice = on_gpu or any(stored[n].dtype != skeleton.dtype for names in blocks.values() for n in names)
    compute = (
        max(sum(stored[n].elements for n in names) for names in blocks.values()) * item if kept_twice else 0
    )
    outside = sum(stored[n].elements * item + stored[n].bytes * kept_twice for n in skeleton.outside_blocks())
    elements = max(sum(stored[n].elements for n in names) for names in blocks.values())
    originals = (
        elements * item if needs_dense(recipe) else 0
    )  # the dense block stays beside the one being pruned
    work = compute + originals + _statistics_bytes(recipe, shapes)
    batch = min(-(-samples // processes), micro_batch(length, skeleton.device)) * length
    inner, width = (
        max(columns for _, columns in shapes.values()),
        skeleton.model.config.get_text_config().hidden_size,
    )
    passing = batch * (6 * inner + 8 * width) * item
    # In float32: weights, masks, a run of AdamW (weights, gradients, two moments) and another at rest, which waits for the comparison of
    # their rates; the weights as computed with; and what the backward pass goes back over.
    tuning = elements * (9 * 4 + item) + 4 * passing if recipe.build_block_steps() else 0
    work += max(_pruning_bytes(recipe, shapes), tuning)
    if on_gpu:
        return _INTERPRETER + max(3 * block, outside), max(work, outside, compute + passing)
    return _INTERPRETER + max(2 * block + work, 3 * block + compute + passing, outside), None


def _statistics_bytes(recipe: Recipe, shapes: Mapping[str, tuple[int, int]]) -> int:
    """All statistics of one block: as many distinct inputs as its matrices have input groups."""
    needs, widths = (
        needs_of(recipe),
        {name.rpartition(".")[2]: columns for name, (_, columns) in shapes.items()},
    )
    groups = sorted(widths.values(), reverse=True)[
        : max(1, -(-len(widths) * 4 // 7))
    ]  # q, k, v and gate, up share theirs
    squares = (Need.GRAM in needs) + (Need.CROSS in needs)
    return sum(4 * c * c * squares if squares else SAMPLE_TOKENS * 4 * c for c in groups)


def _pruning_bytes(recipe: Recipe, shapes: Mapping[str, tuple[int, int]]) -> int:
    """What a pruner and its steps hold of the largest matrix [R, C]: weight, score, mask, result; Gram solvers some [C, C] more."""
    rows, columns = max(shapes.values(), key=lambda shape: shape[0] * shape[1])
    algorithms = [recipe.build_pruner(), *(step for _, step in recipe.build_steps())]
    grams = max(a.gram_copies for a in algorithms) if Need.GRAM in needs_of(recipe) else 0
    widest = max(columns for _, columns in shapes.values())
    return 4 * (rows * columns * max(a.copies for a in algorithms) + widest**2 * grams)


def predict_scoring(
    skeleton: Skeleton, source: WeightSource, texts: Iterable[tuple[int, int]], tasks: bool
) -> tuple[int, int | None]:
    """Peak private bytes of scoring on the host and on the GPU (None: there is none): texts as (windows, tokens), and whether tasks too.

    Perplexity holds one block and the next, then embeddings, head and the logits of one micro-batch; lm-eval the whole model and the
    logits of a batch of requests.
    """
    item, on_gpu = skeleton.dtype.itemsize, skeleton.device.type != "cpu"
    vocabulary = skeleton.model.config.get_text_config().vocab_size
    stored = {name: source.tensors[where] for name, where in skeleton.stored.items()}
    block = max(sum(stored[n].bytes for n in skeleton.parameters_of(b)) for b in skeleton.blocks)
    outside = sum(stored[n].elements * item for n in skeleton.outside_blocks())
    host = compute = 0
    for windows, tokens in texts:
        inputs = min(STORE_BYTES, activation_bytes(skeleton, windows, tokens))
        logits = outside + vocabulary * (
            min(windows, micro_batch(tokens, skeleton.device)) * tokens * item + 2 * tokens * 4
        )
        host = max(host, 3 * block + inputs, (outside if on_gpu else logits) + inputs)
        compute = max(compute, 2 * block, logits)
    if tasks:
        whole = sum(t.elements * item for t in stored.values())
        logits = BATCH * _REQUEST * vocabulary * (item + 2 * 4)  # as computed, in float32, and as logarithms
        host = LM_EVAL + max(host, whole if on_gpu else whole + logits)
        compute = max(compute, whole + logits)
    return _INTERPRETER + host, compute if on_gpu else None
