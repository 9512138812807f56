"""The types that the rest of the package is written against: what an algorithm is given, and what it returns.

Shapes: R out_features, C in_features, K columns of a slice,
N sequences, T tokens, S sampled tokens, D model width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Flag, auto
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Measure = float | Mapping[str, Sequence[float]]  # what an allocator measures of a block
VALUES = {"same": 16, "int8": 8, "int4": 4}  # bits of a packed value; 16 stands for values as they are


class Need(Flag):
    """The input statistics that an algorithm can ask for; combine them with `|`.

    `InputStats` says what each one is.
    """

    NONE = 0
    MEAN = auto()
    SECOND_MOMENT = auto()
    VARIANCE = auto()
    WITHIN_VARIANCE = auto()
    GRAM = auto()
    CROSS = auto()
    SAMPLE = auto()


class InputStats:
    """Statistics of the inputs that some matrices share, averaged over the tokens; all float32.

    Args:
        count: number of tokens they were computed from.
        sequence_length: tokens per calibration sequence.
        values: the collected statistics. Reading one that was not declared raises `LookupError`.
    """

    def __init__(self, count: int, sequence_length: int, values: Mapping[Need, Tensor]) -> None:
        self.count, self.sequence_length, self._values = count, sequence_length, dict(values)
        self._derived: dict[Any, Any] = {}

    def derived(self, key: Any, compute: Callable[[], T]) -> T:
        """The result of `compute`, computed once for all matrices that share these inputs.

        `key` identifies the result and the options it depends on.
        """
        if key not in self._derived:
            self._derived[key] = compute()
        return self._derived[key]  # type: ignore[no-any-return]

    @property
    def needs(self) -> Need:
        """The statistics that were collected and can be read."""
        collected = Need.NONE
        for need in self._values:
            collected |= need
        return collected

    def _read(self, need: Need) -> Tensor:
        if need not in self._values:
            raise LookupError(
                f"statistic {need.name} was read but not declared; "
                f"add Need.{need.name} to the algorithm's `needs`"
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
        """Mean over the tokens of the population variance within each token's own sequence, [C]."""
        return self._read(Need.WITHIN_VARIANCE)

    @property
    def gram(self) -> Tensor:
        """Gram matrix X^T X / `count` over all tokens, [C, C]."""
        return self._read(Need.GRAM)

    @property
    def cross(self) -> Tensor:
        """X_dense^T X / `count`, [C, C]: X_dense are the inputs of the same matrix in the dense model."""
        return self._read(Need.CROSS)

    @property
    def sample(self) -> Tensor:
        """Inputs of some tokens, [S, C], drawn with a seed, equally many from each sequence."""
        return self._read(Need.SAMPLE)


@dataclass(frozen=True)
class CalibrationSet:
    """Calibration tokens int64 [N, T] on the CPU, with their source, seed and hash (`digest`).

    `details` go into the record: how the rows were made, as far as `source` and `seed` do not say it.
    """

    tokens: Tensor
    source: str
    seed: int
    digest: str
    details: Mapping[str, Any] = field(default_factory=dict)


class Pattern(ABC):
    """A sparsity pattern: turns a score into a keep mask with an exact number of zeros."""

    width: int  # columns per group: M for N:M, 1 for unstructured; a group must never be split

    @abstractmethod
    def select(self, score: Tensor, sparsity: float, start: int = 0) -> Tensor:
        """Keep mask, bool [R, K], of a score [R, K]: higher scores are kept.

        Of equal scores the lower column is pruned first.

        `start`: the first column, where the score is a slice of a matrix. Adjoining slices together prune
        exactly as many weights as the whole matrix would.
        """

    @abstractmethod
    def check(self, keep: Tensor, sparsity: float) -> None:
        """Raise `ValueError` unless the mask [R, C] has the exact count and grouping."""

    @abstractmethod
    def __str__(self) -> str: ...


@dataclass(frozen=True)
class Job:
    """One matrix to prune. `weight` is the dense matrix, float32 [R, C], and must not be written to.

    `routed`: it belongs to an expert, whose statistics are those of the tokens routed to it. The dense model
    routes others to it, so there is no `Need.CROSS` among them. `gradient`: float32 [R, C], the square of the
    gradient of the loss of one sequence, averaged over some sequences; only for an allocator that asks for
    it.
    """

    name: str
    weight: Tensor
    stats: InputStats
    pattern: Pattern
    sparsity: float
    generator: torch.Generator
    routed: bool = False
    gradient: Tensor | None = None


@dataclass(frozen=True)
class Pruned:
    """A pruned matrix: `weight`, float32 [R, C], is zero wherever `keep`, bool [R, C], is False.

    `score` [R, C] is the score that chose the mask; later steps may use it. `notes` go into the matrix's row
    of the record. `scales`, bfloat16 [R, ceil(C / 128)]: every weight is a whole number of a few bits times
    its scale; None where weights are not rounded.
    """

    weight: Tensor
    keep: Tensor
    score: Tensor
    notes: Mapping[str, Any] = field(default_factory=dict)
    scales: Tensor | None = None


class Algorithm:
    """Base of every algorithm. Its options are a nested frozen dataclass `Config`, which checks them.

    The class attributes say what the algorithm costs; the plan estimates memory and time from them.

    Attributes:
        copies: float32 copies of a weight [R, C] in memory at once.
        gram_copies: copies of a Gram matrix [C, C] in memory at once.
        visits: how often every entry of a weight is read or written.
        products: products of a weight with a [C, C] matrix, 2 R C^2 operations each.
        solves: factorisations of a [C, C] matrix, 2 C^3 operations each, once per input that several matrices
            share.
        decompositions: eigendecompositions of a [C, C] matrix in float64, once per shared input.
    """

    copies: ClassVar[int] = 4
    gram_copies: ClassVar[int] = 3  # the matrix, its factor, and a work copy
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
    """Chooses the keep mask of a matrix, and may change the kept weights.

    `scope`: whether its paper compares scores per `row` or over the whole `matrix` for unstructured masks.
    """

    needs: Need = Need.NONE
    scope: ClassVar[str] = "row"

    @abstractmethod
    def prune(self, job: Job) -> Pruned:
        """The pruned matrix; the mask satisfies `job.pattern` exactly."""


class ScorePruner(Pruner):
    """A pruner that only scores the weights: the kept weights stay unchanged."""

    @abstractmethod
    def score(self, weight: Tensor, stats: InputStats, generator: torch.Generator) -> Tensor:
        """Importance of each weight, [R, C]; the highest are kept."""

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
        weights: the pruned matrices by name, float32, laid out as in the block.
        keeps: their keep masks, laid out in the same way.
        mine: the sequences that this process holds.
        batch: the most sequences to run at once.
        outputs: the block's outputs [n, T, D], given weights like `weights` and some sequences of `mine`;
            gradients flow back to these weights.
        targets: the dense model's outputs of the same block, [n, T, D].
        add: sums tensors over all processes, in place.
        scales: where the weights are whole numbers times a scale, as in `Pruned.scales`, bfloat16 and laid
            out like the weights, with one entry for 128 columns; the tuned weights must be so too.
        bits: of these numbers.
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
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    bits: int = 0


@dataclass(frozen=True)
class Tuned:
    """The tuned matrices of a block, laid out and named as in `BlockJob.weights`, and `scales` as there.

    `notes` go into the record's row of every matrix.
    """

    weights: Mapping[str, Tensor]
    notes: Mapping[str, Any] = field(default_factory=dict)
    scales: Mapping[str, Tensor] = field(default_factory=dict)


class BlockStep(Algorithm, ABC):
    """An update of a whole block: changes the kept weights of all its matrices together and leaves the masks.

    `trained`: sequences it runs forward and backward, for the estimate of time.
    """

    changes: ClassVar[str] = "weights"
    trained: float = 0

    @abstractmethod
    def apply(self, job: BlockJob) -> Tuned:
        """The tuned matrices."""


class Allocator(Algorithm, ABC):
    """Divides the model's sparsity among its matrices.

    The plan then shifts and rounds the returned sparsities so that the total is exact.

    An allocator with `trials` (one label each) allocates once per trial. The model is pruned with each
    allocation by `trial_pruner` (empty: the recipe's own pruner), and the one with the lowest loss on
    held-out calibration rows is used.

    An allocator with `needs` or `rows` measures the blocks of the dense model first. `rows` calibration
    sequences, the first `length` tokens of each, go through the model and back for `Job.gradient`; an
    allocator that has them gets no input statistics.
    """

    needs: Need = Need.NONE
    rows: int = 0
    length: int = 0
    trials: tuple[str, ...] = ()
    trial_pruner: str = ""

    @property
    def measures(self) -> bool:
        """Whether it looks at the dense model before it decides."""
        return bool(self.needs) or self.rows > 0

    def measure(self, jobs: Iterable[Job]) -> Measure:
        """What is known of a block, computed from all its matrices and their inputs in the dense model.

        Only called if the allocator has `needs` or `rows`. It is one number, or some for each matrix by its
        name, and goes into the record as it is.

        `jobs` can be iterated several times. Each pass reads the weights again, so that only one is in memory
        at a time.
        """
        return 0.0

    @abstractmethod
    def allocate(
        self,
        shapes: Mapping[str, tuple[int, int]],
        blocks: Mapping[str, int],
        measures: Mapping[int, Any],
        sparsity: float,
        trial: int = 0,
    ) -> dict[str, float]:
        """The wished sparsity of every matrix, by name.

        Args:
            shapes: matrix name -> (R, C).
            blocks: matrix name -> number of its block.
            measures: block number -> what `measure` returned.
            sparsity: of the whole model.
            trial: which of the `trials` to allocate for, counted from 0.
        """


class Reporter(Protocol):
    """Shows the progress of a run to the user."""

    def stage(self, title: str, steps: int) -> None:
        """Called when a stage of `steps` steps begins."""

    def step(self) -> None:
        """Called when one step of the current stage is done."""

    def note(self, text: str) -> None:
        """Called with one line that the user should know."""
