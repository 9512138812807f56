"""What is trained of a matrix, and which of its weights a mask keeps: `Matrix`, `MaskRule`, `Trainable`.

One matrix has `theta`, what the optimizer moves, and a keep mask k, 1 = kept. V is the weight that the model
computes with, G the gradient of the loss with respect to V, dense. One step is

    V = theta * (k + beta (1 - k))
    g = G * (k + gamma (1 - k)), and of pruned weights the decay lambda theta
    theta <- optimizer(theta, g);  theta <- theta * (k + rho (1 - k))

Shapes: R outputs, C inputs, n sequences, T tokens, D model width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmprune.contracts import Algorithm, Pattern
from llmprune.patterns import NM, Unstructured
from llmprune.recovery.phases import Phase


@dataclass(frozen=True)
class Matrix:
    """A matrix to train.

    Attributes:
        weight: where training starts, [R, C], or of any shape where nothing moves.
        keep: its keep mask, bool; all True for a dense one.
        pattern: that its mask ends with. sparsity: likewise.
        part: its place among the matrices, in [0, 1): which part of the model it belongs to.
        origin: the dense model's weight, where it is known; grown weights may start from it.
        scales, bits: where it is rounded, as in `contracts.BlockJob`.
        least: the sparsity below which no schedule goes: that of a pruned start, if nothing comes back.
        still: whether its mask never moves, and nothing but kept weights counts.
    """

    weight: Tensor
    keep: Tensor
    pattern: Pattern | None = None
    sparsity: float = 0.0
    part: float = 0.0
    origin: Callable[[], Tensor] | None = None
    scales: Tensor | None = None
    bits: int = 0
    least: float = 0.0
    still: bool = False

    def first_mask(self) -> Tensor:
        """Its keep mask; of a dense one that of the largest weights, with the pattern and sparsity of the
        end.
        """
        if self.pattern is None or not bool(self.keep.all()):
            return self.keep
        return self.pattern.select(self.weight.detach().float().abs().contiguous(), self.sparsity)

    def aim(self, phase: Phase) -> tuple[Pattern, float] | None:
        """The pattern and sparsity of its mask at a step; None while it is dense."""
        if self.pattern is None or int(self.part * phase.parts) in phase.dense:
            return None
        # A little is added to `least`, so that the rounding of a product cannot lose one of its weights.
        least = self.least + 1e-9 if self.least else 0.0
        initial = min(max(phase.initial, least), self.sparsity)
        sparsity = initial + (self.sparsity - initial) * phase.reach
        if phase.reach >= 1:
            return self.pattern, self.sparsity
        if not isinstance(self.pattern, NM):
            return (self.pattern, sparsity) if sparsity > 0 else None
        # On the way to N:M as many of a group are kept as the sparsity asks for, rounded up.
        kept = max(self.pattern.n, math.ceil(self.pattern.width * (1 - sparsity) - 1e-9))
        return (
            (NM(kept, self.pattern.width), 1 - kept / self.pattern.width)
            if kept < self.pattern.width
            else None
        )


def exact_sparsity(keep: Tensor) -> tuple[Unstructured, float]:
    """The unstructured pattern of a mask [R, C] and a sparsity at which it prunes exactly as many weights.

    Counts are of each row where all rows keep equally many, else of the whole matrix. Half a weight is added,
    so that the rounding of the product cannot lose one.
    """
    counts = keep.shape[1] - keep.sum(dim=1)
    if bool((counts == counts[0]).all()):
        pruned, size, scope = int(counts[0]), keep.shape[1], "row"
    else:
        pruned, size, scope = int(counts.sum()), keep.numel(), "matrix"
    return Unstructured(scope), (pruned + 0.5) / size if pruned else 0.0


@dataclass(frozen=True)
class View:
    """What a mask rule sees of a matrix.

    Attributes:
        weight: what its masks compare, [R, C].
        keep: its mask, bool.
        aim: the pattern and sparsity of the new mask; None where it becomes dense.
        phase: what holds.
        generator: seeded by matrix and step.
        gradient: G, dense; None unless the rule asks for it.
        mean, square: the moments of Adam, corrected for their start; None before the first step, or without.
        inputs: the mean square of each input, [C]; None unless the rule asks for it.
        active: at how many moves each weight was kept; None unless the rule asks for it.
        learned: the score that the trainable has learned; None without.
    """

    weight: Tensor
    keep: Tensor
    aim: tuple[Pattern, float] | None
    phase: Phase
    generator: torch.Generator
    gradient: Tensor | None = None
    mean: Tensor | None = None
    square: Tensor | None = None
    inputs: Tensor | None = None
    active: Tensor | None = None
    learned: Tensor | None = None


class MaskRule(Algorithm, ABC):
    """Scores the weights of a matrix when its mask moves; the loop keeps the highest.

    Attributes:
        wants: what it needs beside weight and mask: names among `gradient`, `moments`, `inputs`, `active`.
        pauses: whether the optimizer does not move at a step after which masks move, whose gradient decides.
    """

    wants: ClassVar[frozenset[str]] = frozenset()
    pauses: ClassVar[bool] = False

    @abstractmethod
    def score(self, view: View) -> Tensor:
        """What each weight is worth, [R, C]."""


class Trainable(Algorithm, ABC):
    """What is trained of a matrix, and the weight it stands for.

    `start` is called once, then `weight` at each step, `settle` after it, `moved` when the mask changes.

    Attributes:
        tensors: what the optimizer moves, float32 and by name; each requires gradients.
        fixed: what else a later part of the training must know, by name. changed: whether a move of the mask
            has changed it.
        masked: the names of tensors of the matrix's own shape, whose pruned entries the numbers rule.
        based: whether it holds the weight of the start too, in the dtype in which that is stored.
        revives: whether it trains pruned weights too, and wants those of the dense model to begin with.
        shrinks: whether it holds no pruned weights of a matrix that is `still`.
    """

    masked: frozenset[str] = frozenset()
    shrinks: ClassVar[bool] = False
    based: ClassVar[bool] = False
    revives: ClassVar[bool] = False

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.tensors: dict[str, Tensor] = {}
        self.fixed: dict[str, Tensor] = {}
        self.changed = False

    def sizes(self, shape: tuple[int, int], pattern: Pattern | None) -> tuple[int, int]:
        """How many float32 numbers it trains of a matrix [R, C], and how many it holds beside them."""
        return shape[0] * shape[1], 0

    @abstractmethod
    def start(self, matrix: Matrix, generator: torch.Generator) -> None:
        """Make the tensors. Raises `ValueError` for a matrix that it cannot train."""

    @abstractmethod
    def weight(self, keep: Tensor, phase: Phase) -> Tensor:
        """V, through which gradients flow to the tensors."""

    @abstractmethod
    def compared(self, keep: Tensor) -> Tensor:
        """What masks compare by size, [R, C]."""

    @abstractmethod
    def merge(self, keep: Tensor) -> Tensor:
        """The weight that is saved, float32, zero where it is pruned."""

    def learned(self, phase: Phase) -> Tensor | None:
        """The score that it has learned; None where it learns none."""
        return None

    def rate_of(self, part: str, size: float) -> float:
        """What the learning rate of a tensor is multiplied with; `size` is what it is relative to."""
        return size

    def kept_fixed(self) -> dict[str, Tensor]:
        """What of `fixed` must be saved, since it is not that of the start any more."""
        return self.fixed if self.changed else {}

    def pull(self, part: str, phase: Phase) -> None:
        """Add what moves a tensor beside the loss to its gradient."""

    def settle(self, keep: Tensor, phase: Phase) -> None:
        """What becomes of the tensors after a step of the optimizer."""

    def moved(self, old: Tensor, new: Tensor, phase: Phase, view: View) -> None:
        """What becomes of the tensors when the mask changes from `old` to `new`."""

    @property
    def penalises(self) -> bool:
        """Whether it adds anything to the loss."""
        return type(self).penalty is not Trainable.penalty

    def penalty(self, weight: Tensor, phase: Phase) -> Tensor | None:
        """What is added to the loss for V; None for nothing."""
        return None
