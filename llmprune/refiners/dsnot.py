"""DSnoT (Zhang et al., arXiv 2310.08915): regrow and prune,
one pair per row and cycle, until the expected error is gone.

R rows, C columns, k candidates per row, S sampled tokens.
"Grow" means to keep a weight that the mask had pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llmprune.contracts import Job, Need, Pruned, Step

# On a CPU, candidates are ranked in slices of about this many weights, which stay in the processor's cache.
_CHUNK = 1 << 16
_HUGE = 1e30
# One cycle: for every row [R] the column to grow, the column to prune, and whether the row swaps them at all.
_Swap = tuple[Tensor, Tensor, Tensor]


class _Rows(NamedTuple):
    """Some rows: dense weights, pruned weights, mask, and the score that chose the mask, all [R, C]."""

    dense: Tensor
    weight: Tensor
    keep: Tensor
    score: Tensor

    def slices(self) -> list[_Rows]:
        """The rows in groups that fit into the processor's cache; on a GPU all rows at once."""
        size = max(1, _CHUNK // self.keep.shape[1]) if self.keep.is_cpu else len(self.keep)
        return [_Rows(*parts) for parts in zip(*(matrix.split(size) for matrix in self), strict=True)]


class DSnoT(Step):
    """Changes the mask by swapping pruned and kept weights of a row, starting from any mask.

    Works for unstructured and N:M masks.

    The expected error of row i is `sum_j (W_ij - W'_ij) * mean_j * L`, with mean_j the mean of input j and L
    the tokens per sequence. Where the kept weights are unchanged, this is the paper's sum over pruned
    weights; after a pruner that changed them (SparseGPT), their change counts too.

    With `verified`, each row takes only as many cycles (perhaps none) as lower its actual output error on a
    sample of the calibration inputs the most, and none unless they lower it by `margin`, so that this error
    never rises. Without it, this is the published algorithm.
    """

    changes = "mask"
    visits = 100

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of DSnoT.

        Attributes:
            max_cycles: most swaps per row.
            share: most swaps per row as a share of the inputs; by default the paper's 50 of 4096.
            threshold: a row stops at this expected error (see the class).
            power: exponent of the variance in the ranking of weights to grow.
            variance: `within` sequences (as in the published code) or `total`.
            verified: check the swaps on sampled inputs (see the class).
            margin: the least share by which the swaps must lower a row's sampled error, and its spread, to be
                taken.
            walk_on: where a row has no kept weight of the wanted sign left, go on with those of the other
                sign, highest score first, as the published code does; otherwise the row stops.
        """

        max_cycles: int = 50
        share: float = 50 / 4096
        threshold: float = 0.1
        power: float = 1.0
        variance: str = "within"
        verified: bool = True
        margin: float = 0.15
        walk_on: bool = False

        def __post_init__(self) -> None:
            if self.max_cycles < 1:
                raise ValueError(f"max_cycles must be at least 1, got {self.max_cycles}")
            if not 0 < self.share <= 1:
                raise ValueError(f"share must be in (0, 1], got {self.share}")
            if not 0 <= self.margin < 1:
                raise ValueError(f"margin must be in [0, 1), got {self.margin}")
            if self.threshold < 0:
                raise ValueError(f"threshold must not be negative, got {self.threshold}")
            if self.variance not in ("within", "total"):
                raise ValueError(f"variance must be 'within' or 'total', got {self.variance!r}")

    @property
    def needs(self) -> Need:  # type: ignore[override]
        variance = Need.WITHIN_VARIANCE if self.config.variance == "within" else Need.VARIANCE
        sample = Need.SAMPLE if self.config.verified else Need.NONE
        return Need.MEAN | Need.SECOND_MOMENT | variance | sample

    def apply(self, job: Job, pruned: Pruned) -> Pruned:
        stats = job.stats
        shift = stats.mean * stats.sequence_length
        variance = stats.within_variance if self.config.variance == "within" else stats.variance
        # A constant feature has variance 0; the floor avoids the division by zero and still ranks it highest.
        spread = variance.clamp_min(torch.finfo(torch.float32).tiny ** 0.5).pow(self.config.power)
        rows = _Rows(job.weight, pruned.weight, pruned.keep, pruned.score)
        weight, keep = pruned.weight.clone(), pruned.keep.clone()
        for grown, dropped, done in self._swaps(job, rows, shift, shift / spread):
            # A row that does not swap writes back what it has. Selecting the rows instead would give shapes
            # that depend on the data, and the host would have to wait for the GPU.
            for matrix, grown_value, dropped_value in (
                (keep, torch.ones_like(done), torch.zeros_like(done)),
                (weight, _pick(job.weight, grown), 0.0),
            ):
                _put(matrix, grown, torch.where(done, grown_value, _pick(matrix, grown)))
                _put(matrix, dropped, torch.where(done, dropped_value, _pick(matrix, dropped)))
        return Pruned(weight, keep, pruned.score, pruned.notes)

    def _swaps(self, job: Job, rows: _Rows, shift: Tensor, urge: Tensor) -> list[_Swap]:
        """The swaps of every cycle.

        Args:
            job: the matrix.
            rows: all its rows.
            shift: contribution of a unit weight to the expected error, [C].
            urge: the same over the variance, by which weights to grow are ranked, [C].
        """
        columns, width = rows.keep.shape[1], job.pattern.width
        cycles = min(self.config.max_cycles, max(1, int(self.config.share * columns)))
        grow = _GrowCandidates(rows, urge, cycles)
        prune: _GroupCandidates | _SignCandidates
        if width > 1:
            prune = _GroupCandidates(rows, width)
        else:
            norm = job.stats.second_moment.sqrt()
            prune = _SignCandidates(rows, shift, norm, cycles, self.config.walk_on)
        expected = torch.cat([(part.dense - part.weight) @ shift for part in rows.slices()])
        first_sign, active = expected.sign(), torch.ones_like(expected, dtype=torch.bool)
        swaps: list[_Swap] = []
        for _ in range(cycles):
            active &= expected.abs() > self.config.threshold
            positive = expected > 0
            grown, can_grow = grow.next(positive)
            dropped, can_prune = prune.next(positive, grown)
            change = _pick(rows.weight, dropped) * shift[dropped] - _pick(rows.dense, grown) * shift[grown]
            active &= can_grow & can_prune
            if width > 1:
                active &= (expected + change).sign() == first_sign
            expected = torch.where(active, expected + change, expected)
            swaps.append((grown, dropped, active.clone()))
            prune.used(dropped, active)
        if self.config.verified:
            taken = _best_cycles(rows, job.stats.sample, self.config.margin, swaps)
            numbered = enumerate(swaps)
            swaps = [(grown, dropped, done & (cycle < taken)) for cycle, (grown, dropped, done) in numbered]
        return swaps


def _pick(matrix: Tensor, columns: Tensor) -> Tensor:
    """The entry of each row [R] in the given column [R]."""
    return matrix.gather(1, columns[:, None]).squeeze(1)


def _put(matrix: Tensor, columns: Tensor, values: Tensor) -> None:
    """Write one value [R] per row into the given column [R], in place."""
    matrix.scatter_(1, columns[:, None], values[:, None])


class _Queue:
    """At most k candidate columns per row, best first; each is given out once."""

    def __init__(self, best: Sequence[tuple[Tensor, Tensor]], sign: int) -> None:
        """Make a queue from ranked columns.

        Args:
            best: values and columns [r, k] of consecutive groups of rows, best first.
            sign: 1 or -1; columns whose value has the other sign are no candidates.
        """
        self._columns = torch.cat([columns for _, columns in best])
        self._valid = torch.cat([values * sign > 0 for values, _ in best])
        self._next = torch.zeros(len(self._valid), 1, dtype=torch.int64, device=self._valid.device)

    def next(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """The first candidate of every row [R], and whether there is one.

        It leaves the queue in rows where `wanted`.
        """
        front = self._next.clamp_max(self._columns.shape[1] - 1)
        column = self._columns.gather(1, front).squeeze(1)
        valid = self._valid.gather(1, front).squeeze(1) & (self._next.squeeze(1) < self._columns.shape[1])
        self._next += wanted[:, None]
        return column, valid

    def then(self, other: _Queue) -> _Queue:
        """Append another queue to this one, row by row, up to k candidates."""
        k = self._columns.shape[1]
        own_count = self._valid.sum(dim=1, keepdim=True)
        position = torch.arange(k, device=own_count.device) - own_count  # in the other queue
        own, position = position < 0, position.clamp(0, k - 1)
        self._columns = torch.where(own, self._columns, other._columns.gather(1, position))
        self._valid = own | other._valid.gather(1, position)
        return self


class _GrowCandidates:
    """The pruned weights, ranked by expected contribution to the output over variance.

    A positive error is lowered by the largest contribution, a negative one by the smallest.
    """

    def __init__(self, rows: _Rows, urge: Tensor, k: int) -> None:
        """`urge` [C]: expected contribution of a unit weight over the variance."""
        urge = urge.clamp(-_HUGE, _HUGE)  # keeps the rank of a constant feature finite
        self._positive, self._negative = _both_ends(rows, k, lambda part: part.dense * urge * ~part.keep)

    def next(self, positive: Tensor) -> tuple[Tensor, Tensor]:
        """The column to grow in each row [R], and whether there is one.

        `positive`: whether the row's error is.
        """
        return _either(positive, self._positive.next(positive), self._negative.next(~positive))


class _SignCandidates:
    """For unstructured masks: kept weights that lower the error when pruned, lowest score first."""

    def __init__(self, rows: _Rows, shift: Tensor, norm: Tensor, k: int, walk_on: bool) -> None:
        # Ranked by 1 / score with the sign of the contribution:
        # the lowest scores of either sign are at the two ends.
        inverse = torch.where(norm > 0, shift.sign() / norm, 0)
        self._if_negative, self._if_positive = _both_ends(
            rows, k, lambda part: (inverse / part.weight).masked_fill_(part.weight == 0, 0)
        )
        if walk_on:
            score = shift.sign() * norm
            highest_positive, highest_negative = _both_ends(rows, k, lambda part: part.weight * score)
            self._if_positive.then(highest_positive)
            self._if_negative.then(highest_negative)
        # With `walk_on` both queues may hold the same column, so the pruned ones are remembered.
        self._used = torch.zeros_like(rows.keep) if walk_on else None

    def next(self, positive: Tensor, grown: Tensor) -> tuple[Tensor, Tensor]:
        """The column to prune in each row [R], and whether there is one.

        `positive`: whether the row's error is.
        """
        column, valid = _either(positive, self._if_positive.next(positive), self._if_negative.next(~positive))
        return column, valid if self._used is None else valid & ~_pick(self._used, column)

    def used(self, columns: Tensor, active: Tensor) -> None:
        """Remember that the active rows pruned these columns, so that no column is pruned twice."""
        if self._used is not None:
            _put(self._used, columns, _pick(self._used, columns) | active)


def _both_ends(rows: _Rows, k: int, value: Callable[[_Rows], Tensor]) -> tuple[_Queue, _Queue]:
    """Two queues: of the k largest values of each row the positive ones, of the k smallest the negative."""
    largest, smallest = [], []
    for part in rows.slices():
        ranked = value(part)
        k = min(k, ranked.shape[1])
        largest.append(ranked.topk(k, dim=1))
        smallest.append(ranked.topk(k, dim=1, largest=False))
    return _Queue(largest, 1), _Queue(smallest, -1)


def _either(condition: Tensor, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Both tensors of `a` in rows where the condition [R] holds, those of `b` elsewhere."""
    return torch.where(condition, a[0], b[0]), torch.where(condition, a[1], b[1])


class _GroupCandidates:
    """For N:M masks: the kept weight with the lowest initial score in the group of the grown weight."""

    def __init__(self, rows: _Rows, width: int) -> None:
        self._score = rows.score.masked_fill(~rows.keep, torch.inf)
        self._offsets = torch.arange(width, device=rows.keep.device)

    def next(self, positive: Tensor, grown: Tensor) -> tuple[Tensor, Tensor]:
        """The column to prune in each row [R], and whether there is one."""
        width = len(self._offsets)
        group = (grown // width * width)[:, None] + self._offsets
        lowest, position = self._score.gather(1, group).min(dim=1)
        return _pick(group, position), lowest.isfinite()

    def used(self, columns: Tensor, active: Tensor) -> None:
        """Remember that the active rows pruned these columns, so that no column is pruned twice."""
        current = _pick(self._score, columns)
        _put(self._score, columns, torch.where(active, torch.inf, current))


def _best_cycles(rows: _Rows, sample: Tensor, margin: float, swaps: Sequence[_Swap]) -> Tensor:
    """How many cycles each row takes, [R]: as many as give the lowest loss on sampled inputs [S, C], or none.

    The loss is the larger of two ratios to the first mask: of the squared output error, and of the error's
    spread around its mean. DSnoT lowers the mean error alone, and a mask that does so by widening the spread
    raises perplexity. A row takes none unless its loss falls to `1 - margin`.
    """
    inputs = sample.T.contiguous()  # [C, S]: a swap changes a row's errors by multiples of two of these rows
    # Columns of the swaps and the change of the errors per
    # unit of input, [R, cycles]; 0 where a row does not swap.
    grown, dropped = (torch.stack([swap[i] for swap in swaps], dim=1) for i in (0, 1))
    active = torch.stack([swap[2] for swap in swaps], dim=1)
    won, lost = -rows.dense.gather(1, grown) * active, rows.weight.gather(1, dropped) * active
    # So many rows at once that their errors stay in the processor's cache through all cycles.
    size = max(1, _CHUNK // len(sample)) if rows.keep.is_cpu else len(rows.keep)
    best = []
    for start in range(0, len(rows.keep), size):
        part = slice(start, start + size)
        error = (rows.dense[part] - rows.weight[part]) @ inputs
        changes = [
            (won[part, c, None], grown[part, c], lost[part, c, None], dropped[part, c])
            for c in range(len(swaps))
        ]
        best.append(_best_of(error, inputs, changes, margin))
    return torch.cat(best)


def _best_of(
    error: Tensor, inputs: Tensor, changes: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]], margin: float
) -> Tensor:
    """The number of cycles with the lowest loss for some rows, [r]; `error` [r, S] is changed in place.

    `changes`: per cycle, change of the error per unit of input and column, of the grown and of the pruned
    weight, [r] each.
    """
    first = _squares(error).clamp_min(torch.finfo(torch.float32).tiny)
    lowest = torch.full_like(first[0], 1 - margin)
    best = torch.zeros(len(error), dtype=torch.int64, device=error.device)
    for cycle, (won, grown, lost, dropped) in enumerate(changes):
        error.addcmul_(lost, inputs[dropped]).addcmul_(won, inputs[grown])
        now = (_squares(error) / first).amax(dim=0)
        better = now < lowest
        lowest = torch.where(better, now, lowest)
        best = torch.where(better, cycle + 1, best)
    return best


def _squares(error: Tensor) -> Tensor:
    """Sum of squares of each row of the errors [r, S], and the same around the row's mean; [2, r]."""
    total, mean = torch.linalg.vecdot(error, error), error.mean(dim=1)
    return torch.stack([total, (total - mean.square() * error.shape[1]).clamp_min(0)])
