"""The types every room agrees on. Shapes: R out_features, C in_features, K columns of a slice, N sequences, T tokens, S sampled tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Flag, auto
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Need(Flag):
    """What an algorithm must know about the inputs of a matrix; combine with `|`."""

    NONE = 0
    MEAN = auto()
    SECOND_MOMENT = auto()
    VARIANCE = auto()
    WITHIN_VARIANCE = auto()
    GRAM = auto()
    CROSS = auto()
    SAMPLE = auto()


class InputStats:
    """Statistics of one input group, per token, float32: vectors [C], gram and cross [C, C], sample [S, C].

    Args:
        count: tokens seen.
        sequence_length: tokens per calibration sequence.
        values: the collected statistics by need; reading one that was not declared raises `LookupError`.
    """

    def __init__(self, count: int, sequence_length: int, values: Mapping[Need, Tensor]) -> None:
        self.count, self.sequence_length, self._values = count, sequence_length, dict(values)
        self._derived: dict[Any, Any] = {}

    def derived(self, key: Any, compute: Callable[[], T]) -> T:
        """What `compute` returns, computed once for all matrices that share these inputs. `key` names it and its options."""
        if key not in self._derived:
            self._derived[key] = compute()
        return self._derived[key]  # type: ignore[no-any-return]

    @property
    def needs(self) -> Need:
        """The statistics that can be read."""
        collected = Need.NONE
        for need in self._values:
            collected |= need
        return collected

    def _read(self, need: Need) -> Tensor:
        if need not in self._values:
            raise LookupError(
                f"statistic {need.name} was read but not declared; add Need.{need.name} to the algorithm's `needs`"
            )
        return self._values[need]

    @property
    def mean(self) -> Tensor:
        """Mean of each input feature, [C]."""
        return self._read(Need.MEAN)

    @property
    def second_moment(self) -> Tensor:
        """Mean square of each input feature, [C]."""
        return self._read(Need.SECOND_MOMENT)

    @property
    def variance(self) -> Tensor:
        """Population variance of each input feature over all tokens, [C]."""
        return self._read(Need.VARIANCE)

    @property
    def within_variance(self) -> Tensor:
        """Token-weighted mean of each sequence's own population variance, [C]."""
        return self._read(Need.WITHIN_VARIANCE)

    @property
    def gram(self) -> Tensor:
        """X^T X / T over all tokens, [C, C]."""
        return self._read(Need.GRAM)

    @property
    def cross(self) -> Tensor:
        """X_dense^T X / T, [C, C]: the dense model's inputs at this place against these, token by token."""
        return self._read(Need.CROSS)

    @property
    def sample(self) -> Tensor:
        """Input rows drawn evenly over the sequences, seeded, [S, C]."""
        return self._read(Need.SAMPLE)


@dataclass(frozen=True)
class CalibrationSet:
    """Calibration tokens int64 [N, T] on the CPU, where they came from, and the hash of the tokens.

    `details` go into the record: what the source leaves open of how the rows were made.
    """

    tokens: Tensor
    source: str
    seed: int
    digest: str
    details: Mapping[str, Any] = field(default_factory=dict)


class Pattern(ABC):
    """Which positions may be pruned together and how many: turns a score into a keep mask."""

    width: int  # columns per indivisible group

    @abstractmethod
    def select(self, score: Tensor, sparsity: float, start: int = 0) -> Tensor:
        """Keep mask, bool [R, K], of a score [R, K]; higher scores are kept, and among equals the lower column is pruned first.

        `start` is the first column of a slice: the counts of slices laid side by side add up to the exact count of the whole matrix.
        """

    @abstractmethod
    def check(self, keep: Tensor, sparsity: float) -> None:
        """Raise `ValueError` unless the mask [R, C] has the exact count and grouping."""

    @abstractmethod
    def __str__(self) -> str: ...


@dataclass(frozen=True)
class Job:
    """One matrix to prune. `weight` is the dense float32 [R, C] and must not be written to."""

    name: str
    weight: Tensor
    stats: InputStats
    pattern: Pattern
    sparsity: float
    generator: torch.Generator


@dataclass(frozen=True)
class Pruned:
    """A pruned matrix: float32 [R, C], zero wherever `keep` (bool [R, C]) is False.

    `score` [R, C] is the ranking that chose the mask, for steps that continue from it. `notes` go into the matrix's row of the record.
    """

    weight: Tensor
    keep: Tensor
    score: Tensor
    notes: Mapping[str, Any] = field(default_factory=dict)


class Algorithm:
    """Shared by every room: a nested frozen `Config`, checked once at construction.

    For the plan's estimate of memory: `copies` of a weight [R, C] in float32 at work at once, and `gram_copies` of a Gram matrix [C, C].

    For its estimate of time: `visits` of every entry of a weight, products of a weight with a [C, C] matrix (2 R C^2 operations each),
    and per input of several matrices `solves` (2 C^3 operations each) and `decompositions` (eigenvalues in float64) of such a matrix.
    """

    copies: ClassVar[int] = 4
    gram_copies: ClassVar[int] = 3  # a factor and its making
    visits: float = 50
    products: float = 0
    solves: float = 0
    decompositions: int = 0

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """No options."""

    def __init__(self, config: Any = None) -> None:
        self.config: Any = config if config is not None else type(self).Config()


class Pruner(Algorithm, ABC):
    """Decides which weights go. `scope` is the comparison its paper uses for unstructured masks."""

    needs: Need = Need.NONE
    scope: ClassVar[str] = "row"

    @abstractmethod
    def prune(self, job: Job) -> Pruned:
        """The pruned matrix; the mask satisfies `job.pattern` exactly."""


class ScorePruner(Pruner):
    """A pruner that only ranks: the kept weights stay as they are."""

    @abstractmethod
    def score(self, weight: Tensor, stats: InputStats, generator: torch.Generator) -> Tensor:
        """Importance [R, C] of each weight; higher is kept."""

    def prune(self, job: Job) -> Pruned:
        score = self.score(job.weight, job.stats, job.generator)
        keep = job.pattern.select(score, job.sparsity)
        return Pruned(job.weight * keep, keep, score)


class Step(Algorithm, ABC):
    """Runs after the pruner and changes one thing: the mask (a refiner) or the kept weights (an update)."""

    needs: Need = Need.NONE
    changes: ClassVar[str]  # "mask" or "weights"
    copies = 6

    @abstractmethod
    def apply(self, job: Job, pruned: Pruned) -> Pruned:
        """The changed matrix; a refiner keeps pattern and count, an update keeps the mask."""


@dataclass(frozen=True)
class BlockJob:
    """A pruned block to tune as a whole, on calibration sequences 0 .. `sequences` - 1.

    Attributes:
        weights: the pruned matrices, float32, laid out as in the block, by name. keeps: their masks, laid out alike.
        mine: the sequences this process holds. batch: the most of them to run at once.
        outputs: given weights like `weights` and sequences of `mine`, the block's outputs [n, T, D]; gradients reach the weights.
        targets: the dense model's outputs of the same block, [n, T, D].
        add: sums tensors over all processes, in place.
    """

    name: str
    weights: Mapping[str, Tensor]
    keeps: Mapping[str, Tensor]
    sequences: int
    mine: range
    batch: int
    outputs: Callable[[Mapping[str, Tensor], list[int]], Tensor]
    targets: Callable[[list[int]], Tensor]
    add: Callable[..., None]
    generator: torch.Generator


@dataclass(frozen=True)
class Tuned:
    """The tuned matrices of a block, laid out and named as in `BlockJob.weights`. `notes` go into the record of every matrix."""

    weights: Mapping[str, Tensor]
    notes: Mapping[str, Any] = field(default_factory=dict)


class BlockStep(Algorithm, ABC):
    """An update of a whole block: moves the kept weights of its matrices together and leaves the masks.

    `trained`: sequences it runs forwards and backwards, for the estimate of time.
    """

    changes: ClassVar[str] = "weights"
    trained: float = 0

    @abstractmethod
    def apply(self, job: BlockJob) -> Tuned:
        """The tuned matrices."""


class Allocator(Algorithm, ABC):
    """Says how the model's sparsity should be shared out over its matrices; the plan shifts and rounds the wishes to the exact total.

    One with `trials` (their labels) is asked to allocate for each of them; the model is pruned so by `trial_pruner` (the recipe's own where
    empty), and the trial with the lowest loss on held-out calibration rows is the one that counts.
    """

    needs: Need = Need.NONE
    trials: tuple[str, ...] = ()
    trial_pruner: str = ""

    def measure(self, jobs: Iterable[Job]) -> float:
        """One number for a block, from all its matrices on the dense model's inputs; asked of allocators with needs alone.

        `jobs` can be gone through several times, and reads each weight anew: at most one of them is in memory.
        """
        return 0.0

    @abstractmethod
    def allocate(
        self,
        shapes: Mapping[str, tuple[int, int]],
        blocks: Mapping[str, int],
        measures: Mapping[int, float],
        sparsity: float,
        trial: int = 0,
    ) -> dict[str, float]:
        """The sparsity wished for every matrix in `shapes` (R, C), given the number of its block and what was measured there.

        `trial`: the number of one of the `trials`.
        """


class Reporter(Protocol):
    """Is told how long work goes."""

    def stage(self, title: str, steps: int) -> None:
        """A stage of so many steps begins."""

    def step(self) -> None:
        """One step of the stage is done."""

    def note(self, text: str) -> None:
        """Something the user should know, in one line."""
