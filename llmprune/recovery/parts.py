"""The five contracts of training with sparsity: `Schedule`, `MaskRule`, `Numbers`, `Trainable`, `Objective`.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llmprune.contracts import Algorithm, Pattern
from llmprune.patterns import NM, Unstructured

FIXED = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """The four numbers of the step above, and how two of them change with the progress of training.

    Attributes:
        beta: what pruned weights count in the forward pass.
        gamma: what share of the gradient reaches them.
        lam: lambda, the decay that pulls them to zero.
        rho: what remains of them after a step.
        beta_fall: how beta falls to zero: `none`, `linear` or `exponential`, over the part of the training
            in which masks move.
        ramp: the share of the training over which lambda rises from zero.
    """

    beta: float = 0.0
    gamma: float = 0.0
    lam: float = 0.0
    rho: float = 0.0
    beta_fall: str = "none"
    ramp: float = 0.0

    def __post_init__(self) -> None:
        for name in ("beta", "gamma", "rho", "ramp"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"numbers.{name} must be in [0, 1], got {getattr(self, name)}")
        if self.lam < 0:
            raise ValueError(f"numbers.lam must be at least 0, got {self.lam}")
        if self.beta_fall not in ("none", "linear", "exponential"):
            raise ValueError(f"numbers.beta_fall must be none, linear or exponential, got {self.beta_fall!r}")

    def at(self, progress: float, moving: float) -> tuple[float, float, float, float]:
        """The numbers at a progress in [0, 1), `moving` being that of the part in which masks move."""
        falls = {"none": 1.0, "linear": max(0.0, 1 - moving), "exponential": math.exp(-5 * moving)}
        ramp = min(1.0, progress / self.ramp) if self.ramp else 1.0
        return self.beta * falls[self.beta_fall], self.gamma, self.lam * ramp, self.rho


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What holds at one step.

    Attributes:
        step: its number, from 0.
        move: whether masks are chosen anew before it.
        reach: how far the sparsity is on its way from `initial` to that of the matrix, in [0, 1].
        initial: the sparsity at reach 0.
        share: of the kept weights, how many a growing rule exchanges.
        dense: the parts of the model that are dense meanwhile; `parts` is how many parts there are.
        frozen: masks do not move any more, and pruned weights are gone.
        numbers: beta, gamma, lambda and rho.
        progress: of the training, in [0, 1).
    """

    step: int
    move: bool = False
    reach: float = 1.0
    initial: float = 0.0
    share: float = 0.0
    dense: frozenset[int] = frozenset()
    parts: int = 1
    frozen: bool = False
    numbers: tuple[float, float, float, float] = FIXED
    progress: float = 0.0


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


class Schedule(Algorithm, ABC):
    """Says what holds at each step: a pure function of the progress.

    Every schedule has the options of its base class; `at` fills in what they decide.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of every schedule.

        Attributes:
            moves: how often masks are chosen anew, at most every step; 0 for never.
            start: the share of the steps before the first move.
            freeze: the share of the steps at the end in which masks are fixed.
        """

        moves: int = 0
        start: float = 0.0
        freeze: float = 0.2

        def __post_init__(self) -> None:
            if self.moves < 0:
                raise ValueError(f"moves must be at least 0, got {self.moves}")
            if not (0 <= self.start < 1 and 0 <= self.freeze < 1 and self.start + self.freeze < 1):
                raise ValueError(
                    f"start and freeze must be shares with a sum below 1, got {self.start} and {self.freeze}"
                )

    def span(self, steps: int) -> range:
        """The steps before which masks may be chosen anew."""
        first = round(self.config.start * steps)
        return range(first, max(first + 1, steps - round(self.config.freeze * steps) + 1))

    def moving(self, step: int, steps: int) -> float:
        """The progress within the part in which masks move, in [0, 1]."""
        span = self.span(steps)
        if step >= span[-1]:
            return 1.0
        return max(0.0, (step - span.start) / (len(span) - 1))

    def moves_at(self, step: int, steps: int) -> bool:
        """Whether masks are chosen anew before a step: `moves` times, evenly spread, the last at the end."""
        span, moves = self.span(steps), min(self.config.moves, len(self.span(steps)))
        if not moves or step not in span:
            return False
        at, length = step - span.start, len(span) - 1
        if moves == 1:
            return at == length
        return any(round(number * length / (moves - 1)) == at for number in _near(at, length, moves))

    def at(self, step: int, steps: int, numbers: Numbers) -> Phase:
        """What holds at a step of so many."""
        frozen = bool(self.config.moves) and step >= self.span(steps)[-1]
        fixed = frozen or not self.config.moves
        progress = step / steps
        found = FIXED if fixed else numbers.at(progress, self.moving(step, steps))
        phase = Phase(
            step=step,
            move=self.moves_at(step, steps),
            frozen=fixed,
            numbers=found,
            progress=progress,
        )
        return self.shape(phase, steps)

    @abstractmethod
    def shape(self, phase: Phase, steps: int) -> Phase:
        """The phase with what this schedule decides."""


def _near(at: int, length: int, moves: int) -> range:
    """The numbers of the moves that may fall on a step."""
    middle = at * (moves - 1) / length
    return range(max(0, math.floor(middle) - 1), min(moves, math.ceil(middle) + 2))


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
    """

    masked: ClassVar[frozenset[str]] = frozenset()
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

    def penalty(self, weight: Tensor, phase: Phase) -> Tensor | None:
        """What is added to the loss for V; None for nothing."""
        return None


class Outputs(NamedTuple):
    """What a model puts out for some sequences.

    Attributes:
        logits: [n, T, vocabulary]; None where only a block is trained.
        hidden: the outputs of every block, [n, T, D] each; empty where no objective asks for them.
    """

    logits: Tensor | None
    hidden: Sequence[Tensor] = ()


class Objective(Algorithm, ABC):
    """A term of the loss: a sum over sequences, which the loop divides by the sum of their `size`.

    Attributes:
        teaches: whether it compares with a teacher.
        looks: whether it needs the outputs of the blocks.
    """

    teaches: ClassVar[bool] = False
    looks: ClassVar[bool] = False

    @abstractmethod
    def size(self, tokens: Tensor, teacher: Outputs | None) -> float:
        """What the sum is divided by, for the sequences of `tokens`, int64 [n, T]."""

    @abstractmethod
    def total(self, student: Outputs, teacher: Outputs | None, tokens: Tensor) -> Tensor:
        """The sum over the sequences."""

    measures: ClassVar[bool] = False  # whether `size` needs the teacher's outputs


_CHUNK = 1 << 23  # logits in float32 that are made at once


def over_tokens(term: Callable[[Tensor, Tensor], Tensor], logits: Tensor, other: Tensor) -> Tensor:
    """The sum of a term over the tokens of a sequence, made for some of them at a time.

    With a large vocabulary, float32 logits and what is made of them take more memory than a block; here they
    are made again in the backward pass.

    Args:
        term: of some rows of both.
        logits: [T, vocabulary].
        other: [T, ...].
    """
    rows = max(1, _CHUNK // logits.shape[-1])
    if len(logits) <= rows:
        return term(logits, other)
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    for some, beside in zip(logits.split(rows), other.split(rows), strict=True):
        total = total + checkpoint(term, some, beside, use_reentrant=False, preserve_rng_state=False)
    return total


@dataclass(frozen=True)
class Term:
    """An objective and its weight in the loss."""

    objective: Objective
    weight: float = 1.0


@dataclass(frozen=True)
class Task:
    """What is to be trained, on which data.

    Attributes:
        matrices: by name; a mapping that makes them when they are read saves memory.
        others: further tensors that are trained as they are, by name: norms, embeddings.
        sequences: how many there are to train on; they go by their numbers.
        held: the numbers of those that are not trained on.
        tokens: of some sequences, int64 [n, T].
        student: the outputs, given weights by name (a mapping that makes them when they are read) and
            numbers of sequences; gradients flow back to the weights.
        teacher: those of the teacher; None without one.
        inputs: the mean square of each input of every matrix, given weights; None where that is unknown.
        mine: of the sequences of a step those that this process has to do.
        batch: the most sequences at once.
        shared: whether several processes do a step together.
        add: sums tensors over all processes, in place.
        agree: replaces a tensor by that of the first process.
    """

    matrices: Mapping[str, Matrix]
    sequences: Sequence[int]
    held: Sequence[int]
    tokens: Callable[[list[int]], Tensor]
    student: Callable[[Mapping[str, Tensor], list[int]], Outputs]
    teacher: Callable[[list[int]], Outputs] | None = None
    others: Mapping[str, Tensor] = field(default_factory=dict)
    inputs: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None
    mine: Callable[[list[int]], list[int]] = list
    batch: int = 8
    shared: bool = False
    add: Callable[..., None] = lambda *tensors: None
    agree: Callable[[Tensor], None] = lambda tensor: None
