"""What a run needs: the input statistics it collects, and predictions of its memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from llmprune.checkpoint.reader import TensorInfo
from llmprune.contracts import Need
from llmprune.evaluation.perplexity import STORE_BYTES
from llmprune.evaluation.zeroshot import BATCH
from llmprune.model.activations import micro_batch
from llmprune.model.skeleton import Skeleton
from llmprune.model.targets import all_targets, targets_of
from llmprune.recipe.types import Recipe
from llmprune.statistics.sums import EXPERT_BYTES, SAMPLE_TOKENS

LM_EVAL = 170_000_000  # private memory of lm-eval and what it imports; it stays until the process ends
_INTERPRETER = 450_000_000  # the same of Python, torch and transformers
_REQUEST = 128  # tokens of the longest requests of most zero-shot tasks
Shapes = Mapping[str, tuple[int, int]]  # [R, C] of the matrices to be pruned, by name


def needs_of(recipe: Recipe) -> Need:
    """The statistics a run collects: what its algorithms need, and what the relative error is computed from.

    The error needs the Gram matrix or, where no algorithm collects that, a sample of the inputs.
    """
    needs = recipe.build_pruner().needs
    for _, step in recipe.build_steps():
        needs |= step.needs
    return needs if Need.GRAM in needs else needs | Need.SAMPLE


def needs_dense(recipe: Recipe) -> bool:
    """Whether the dense model's block inputs must be computed beside the pruned model's."""
    return bool(recipe.build_block_steps()) or Need.CROSS in needs_of(recipe)


def exact_bytes(recipe: Recipe, skeleton: Skeleton, shapes: Shapes) -> int:
    """Bytes of the float32 results that an unfinished run keeps, of all matrices; 0 for most recipes."""
    if recipe.precision != "float32":
        return 0
    dtypes = {t.name: skeleton.source.tensors[t.tensor].dtype for t in all_targets(skeleton)}
    return sum(4 * r * c for n, (r, c) in shapes.items() if dtypes[n] != torch.float32)


def activation_bytes(skeleton: Skeleton, samples: int, length: int) -> int:
    """Bytes of the block inputs of all samples."""
    return samples * length * skeleton.width * skeleton.dtype.itemsize


def measuring_bytes(recipe: Recipe, skeleton: Skeleton, samples: int, length: int) -> int:
    """Bytes of the block inputs that an allocator keeps, of all blocks, to go back through them."""
    allocator = recipe.build_allocator()
    rows, tokens = min(samples, allocator.rows), min(length, allocator.length)
    return activation_bytes(skeleton, rows, tokens) * (len(skeleton.blocks) + 2)


def halted_bytes(skeleton: Skeleton, shapes: Shapes, tokens: int) -> int:
    """Bytes held by forward passes that are halted within a block.

    Counted are the widest input of a matrix, and q, k, v before and after their rotation.
    """
    widest = max(columns for _, columns in shapes.values())
    return tokens * (widest + 8 * skeleton.width) * skeleton.dtype.itemsize


def predict_memory(
    recipe: Recipe, skeleton: Skeleton, shapes: Shapes, samples: int, length: int, processes: int
) -> tuple[int, int | None]:
    """Peak private bytes of a process, on the host and on the GPU (None: there is none).

    Not counted are the block inputs of all samples. While a matrix is pruned, memory holds its block as
    stored, the next block (read ahead), a copy of the block in the compute dtype where that is another, the
    statistics, and what the pruner needs for the largest matrix. Before the first block it holds the
    embeddings and one micro-batch.
    """
    item, on_gpu = skeleton.dtype.itemsize, skeleton.device.type != "cpu"
    blocks = [_infos(skeleton, skeleton.parameters_of(b)) for b in skeleton.blocks]
    block = max(sum(t.bytes for t in tensors) for tensors in blocks)
    elements = max(sum(t.elements for t in tensors) for tensors in blocks)
    converted = any(group.converter is not None for group in skeleton.group_of.values())
    other = any(t.dtype != skeleton.dtype for tensors in blocks for t in tensors)
    kept_twice = on_gpu or converted or other
    compute = elements * item if kept_twice else 0
    rest = _infos(skeleton, skeleton.outside_blocks())
    outside = sum(t.elements * item + t.bytes * kept_twice for t in rest)
    originals = elements * item if needs_dense(recipe) else 0  # the dense block, kept while it is pruned
    # Float32 results of the block before, while they are written.
    writing = 4 * elements if exact_bytes(recipe, skeleton, shapes) else 0
    work = compute + originals + _statistics_bytes(recipe, shapes) + _expert_bytes(recipe, skeleton)
    batch = min(-(-samples // processes), micro_batch(length, skeleton.device)) * length
    widest = max(columns for _, columns in shapes.values())
    passing = batch * (6 * widest + 8 * skeleton.width) * item
    # In float32: weights, masks, and a run of AdamW (weights, gradients, two moments); masks as bool; the
    # weights in the compute dtype; what the backward pass reads.
    # Of rounded weights also the codes, their scales, what is computed with, and its gradients.
    tuning = elements * ((6 + 5 * bool(recipe.bits)) * 4 + 1 + item) + 4 * passing
    tuning = tuning if recipe.build_block_steps() else 0
    # An allocator that looks at gradients: those of one sequence, the sums of their squares, what the
    # backward pass reads; and the logits.
    allocator, back, head = recipe.build_allocator(), 0, 0
    if allocator.rows:
        tokens = min(length, allocator.length)
        back = elements * (item + 2 * 4) + 4 * passing // batch * tokens
        head = outside + tokens * skeleton.vocabulary * (item + 3 * 4)
    work += max(_pruning_bytes(recipe, shapes), tuning, back)
    if on_gpu:
        return _INTERPRETER + writing + max(3 * block, outside), max(work, outside, compute + passing, head)
    # While a block is converted, memory holds it as stored and as it becomes, beside the next one, which is
    # read, and the one before, which is written.
    loading = (5 if converted else 3) * block + (0 if converted else compute)
    host = max(2 * block + work, loading + passing, outside, head)
    return _INTERPRETER + writing + host, None


def _infos(skeleton: Skeleton, names: Iterable[str]) -> list[TensorInfo]:
    """What the checkpoint holds for some parameters."""
    return [skeleton.source.tensors[name] for name in skeleton.tensors_of(names)]


def _statistics_bytes(recipe: Recipe, shapes: Shapes) -> int:
    """All statistics of one block: as many distinct inputs as its matrices have input groups."""
    needs = needs_of(recipe)
    widths = {name.rpartition(".")[2]: columns for name, (_, columns) in shapes.items()}
    # Four distinct inputs of seven matrices: q, k, v share one, and so do gate and up.
    inputs = max(1, -(-len(widths) * 4 // 7))
    groups = sorted(widths.values(), reverse=True)[:inputs]
    squares = (Need.GRAM in needs) + (Need.CROSS in needs)
    return sum(4 * c * c * squares if squares else SAMPLE_TOKENS * 4 * c for c in groups)


def _expert_bytes(recipe: Recipe, skeleton: Skeleton) -> int:
    """The Gram matrices of the experts of one block, which are collected in portions where they are many."""
    if Need.GRAM not in needs_of(recipe):
        return 0
    whole = 0
    for name in skeleton.blocks:
        places = {t.place: t.shape[1] for t in targets_of(skeleton, name) if t.routed}
        whole = max(whole, sum(4 * columns * columns for columns in places.values()))
    return min(whole, EXPERT_BYTES)


def _pruning_bytes(recipe: Recipe, shapes: Shapes) -> int:
    """What pruner and steps hold of the largest matrix [R, C].

    That is weight, score, mask and result; solvers that use the Gram matrix hold some more of [C, C].
    """
    rows, columns = max(shapes.values(), key=lambda shape: shape[0] * shape[1])
    algorithms = [recipe.build_pruner(), *(step for _, step in recipe.build_steps())]
    grams = max(a.gram_copies for a in algorithms) if Need.GRAM in needs_of(recipe) else 0
    widest = max(columns for _, columns in shapes.values())
    return 4 * (rows * columns * max(a.copies for a in algorithms) + widest**2 * grams)


def predict_scoring(
    skeleton: Skeleton, texts: Iterable[tuple[int, int]], tasks: bool
) -> tuple[int, int | None]:
    """Peak private bytes of scoring on the host and on the GPU (None: there is none).

    Perplexity holds one block and the next, then embeddings, output head and the logits of one micro-batch;
    lm-eval holds the whole model and the logits of a batch of requests.

    Args:
        skeleton: the model. texts: of every text, its windows and their tokens. tasks: whether there are any.
    """
    item, on_gpu = skeleton.dtype.itemsize, skeleton.device.type != "cpu"
    vocabulary = skeleton.vocabulary
    block = max(sum(t.bytes for t in _infos(skeleton, skeleton.parameters_of(b))) for b in skeleton.blocks)
    outside = sum(t.elements * item for t in _infos(skeleton, skeleton.outside_blocks()))
    host = compute = 0
    for windows, tokens in texts:
        inputs = min(STORE_BYTES, activation_bytes(skeleton, windows, tokens))
        batch = min(windows, micro_batch(tokens, skeleton.device))
        logits = outside + vocabulary * (batch * tokens * item + 2 * tokens * 4)
        host = max(host, 3 * block + inputs, (outside if on_gpu else logits) + inputs)
        compute = max(compute, 2 * block, logits)
    if tasks:
        whole = skeleton.elements * item
        logits = BATCH * _REQUEST * vocabulary * (item + 2 * 4)  # as computed, in float32, as logarithms
        host = LM_EVAL + max(host, whole if on_gpu else whole + logits)
        compute = max(compute, whole + logits)
    return _INTERPRETER + host, compute if on_gpu else None
