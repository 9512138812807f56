"""What a recovery will hold in memory, before it starts: by part, and per weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmprune.common.messages import duration, size_text
from llmprune.contracts import Pattern
from llmprune.model.skeleton import Skeleton
from llmprune.model.target import Target
from llmprune.planning.estimate import training_seconds
from llmprune.recipe.recovery import RecoveryRecipe

_PROCESS = 700_000_000  # Python, torch and transformers, and what their backward passes allocate once


@dataclass(frozen=True, kw_only=True)
class Extent:
    """What is trained, and on how much.

    Attributes:
        targets: the matrices.
        pattern: that they end with; None where that does not matter.
        others: how many numbers are trained beside them.
        batch: sequences at once. length: tokens of each.
        sequences: all of them, for training block by block.
        taught: whether a teacher is in memory.
        recompute: whether activations are computed twice instead of kept.
        processes: that do a step together.
        kept: the share of weights that the masks of the start keep.
    """

    targets: Sequence[Target]
    pattern: Pattern | None
    others: int
    batch: int
    length: int
    sequences: int
    taught: bool
    recompute: bool
    processes: int = 1
    kept: float = 1.0


@dataclass(frozen=True)
class TrainingPlan:
    """The memory of a recovery.

    Attributes:
        parts: bytes by part.
        weights: of the matrices that are trained.
        trained: how many numbers are trained.
        steps: of the optimizer. tokens: in all.
        available: bytes that are free.
        state: bytes of the state on disk, with which a training goes on, at most. result: those of its best
            step. Both are 0 where it is block by block.
        seconds: that training is estimated to take on this machine, within a factor of about two.
    """

    parts: dict[str, int]
    weights: int
    trained: int
    steps: int
    tokens: int
    available: int
    state: int
    result: int
    seconds: float

    @property
    def memory(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())

    @property
    def per_weight(self) -> float:
        """Bytes per weight of the matrices, without activations and what every process takes."""
        kept = ("weights", "trained", "teacher")
        return sum(self.parts.get(name, 0) for name in kept) / max(1, self.weights)

    def lines(self) -> list[str]:
        """The plan in words."""
        listed = ", ".join(f"{name} {size_text(count)}" for name, count in self.parts.items() if count)
        return [
            f"{self.trained:,} numbers are trained, for {self.weights:,} weights of matrices, "
            f"in {self.steps:,} steps of {self.tokens // max(1, self.steps):,} tokens: about "
            f"{duration(self.seconds)} here",
            f"memory: about {size_text(self.memory)} of {size_text(self.available)} free "
            f"({self.per_weight:.1f} bytes per weight): {listed}",
        ]

    def check(self) -> None:
        """Raise `ValueError` where it cannot fit."""
        if self.memory > self.available:
            raise ValueError(
                f"training needs about {size_text(self.memory)} of memory "
                f"({self.per_weight:.1f} bytes per weight) and {size_text(self.available)} are free; take a "
                "recipe that trains less (masklora, perp) or one block at a time (ebft), or fewer --seqlen"
            )


def training_plan(
    skeleton: Skeleton, recipe: RecoveryRecipe, extent: Extent, steps: int, available: int
) -> TrainingPlan:
    """The plan of a recovery. It checks nothing."""
    method, targets = recipe.method(1), extent.targets
    trainable = method.trainable()
    alone = trainable.shrinks and method.still  # kept weights alone are held
    share_kept = extent.kept if alone else 1.0
    item, tokens = skeleton.dtype.itemsize, extent.batch * extent.length
    by_block: dict[str, int] = {}
    for target in targets:
        block = next((b for b in skeleton.blocks if target.parameter.startswith(f"{b}.")), "")
        by_block[block] = by_block.get(block, 0) + target.shape[0] * target.shape[1]
    widest = max((t.shape[0] * t.shape[1] for t in targets), default=0)
    weights, largest = sum(by_block.values()), max(by_block.values(), default=0)
    sizes = [trainable.sizes(target.shape, extent.pattern) for target in targets]
    each = [round(share_kept * numbers) for numbers, _ in sizes]
    numbers, beside = sum(each), sum(held for _, held in sizes)
    moments = 2 if recipe.optimizer.name == "adamw" else 1
    one = recipe.scope == "block"
    share = largest / max(1, weights) if one else 1.0
    trained = round(share * numbers) + (0 if one else extent.others)
    wants = method.rule.wants if method.rule and recipe.moves else frozenset()
    # A gradient is freed once its tensor has moved, unless all are needed together.
    together = recipe.clip or extent.processes > 1 or wants & {"gradient", "moments"}
    gradients = trained if together or trainable.penalises else max(*each, extent.others, 0)
    stored = _stored_bytes(skeleton, targets) if trainable.based or one else 0
    if trainable.based and recipe.moves:  # what was trained is added to them at a move
        stored = max(stored, 4 * weights)
    made = largest if extent.recompute or one else weights
    parts = {
        "trained": 4 * (trained * (1 + moments) + gradients + round(share * beside)),
        "weights": round(share * stored) + _rest_bytes(skeleton, targets) * (not one),
        "masks": (1 + alone) * weights // 8 + largest,
        # With the mask that the backward pass needs, where not kept weights alone are held.
        "made weights": made * (item + (not alone)) + widest * (8 + item),
        "activations": _activations(skeleton, extent, one),
        "logits": 0 if one else tokens * skeleton.vocabulary * 2 * item + 16 * (1 << 23),
        "process": _PROCESS,
    }
    if "active" in wants:
        parts["trained"] += 4 * weights
    if recipe.soup.copies * recipe.soup.phases > 1:  # the sum of the copies, and where they start
        parts["soup"] = 5 * weights + _stored_bytes(skeleton, targets)
    if extent.taught:
        parts["teacher"] = largest * item if one else _model_bytes(skeleton)
    if one:
        parts["block inputs"] = 2 * extent.sequences * extent.length * skeleton.width * item
    count = steps * recipe.batch * extent.length
    # Block by block every block is trained on so many tokens, in steps over its own numbers.
    moved = round(numbers) if one else trained
    step = recipe.batch * extent.length
    beside = extent.taught + (extent.recompute and not one)
    seconds = training_seconds(skeleton, recipe, (count, step, extent.length), moved, beside)
    # Saved are what is trained with its moments, masks of a byte per weight, and what a move has merged.
    merged = 4 * weights if trainable.based and recipe.moves else 0
    state = 0 if one else parts["trained"] + weights + merged + parts.get("soup", 0)
    result = 0 if one else 5 * weights + 4 * extent.others
    return TrainingPlan(
        parts, weights, trained, steps, count, available, state, result, seconds / extent.processes
    )


def activations(targets: Sequence[Target], tokens: int, dtype: torch.dtype) -> int:
    """About how many bytes the activations of so many tokens take, those of all matrices kept.

    A matrix keeps what enters and leaves it, and about as much is kept between matrices.
    """
    return sum(2 * sum(target.shape) * tokens * dtype.itemsize for target in targets)


def _activations(skeleton: Skeleton, extent: Extent, one: bool) -> int:
    tokens, blocks = extent.batch * extent.length, max(1, len(skeleton.blocks))
    whole = activations(extent.targets, tokens, skeleton.dtype)
    if not (extent.recompute or one):
        return whole
    return whole // blocks + blocks * tokens * skeleton.width * skeleton.dtype.itemsize


def _stored_bytes(skeleton: Skeleton, targets: Sequence[Target]) -> int:
    names = {target.tensor for target in targets}
    return sum(skeleton.source.tensors[name].bytes for name in names)


def _model_bytes(skeleton: Skeleton) -> int:
    return skeleton.elements * skeleton.dtype.itemsize


def _rest_bytes(skeleton: Skeleton, targets: Sequence[Target]) -> int:
    """Of the model's own parameters that stay loaded: all but those that are matrices to train."""
    freed = {target.tensor for target in targets if target.module is not None}
    names = set(skeleton.tensors_of(skeleton.group_of)) - freed
    return sum(skeleton.source.tensors[name].elements for name in names) * skeleton.dtype.itemsize
