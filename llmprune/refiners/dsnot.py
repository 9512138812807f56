"""DSnoT (Zhang et al., arXiv 2310.08915): regrow and prune, one pair per row and cycle, until the expected error is gone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llmprune.contracts import Job, Need, Pruned, Step

# Legend: R rows, C columns, k candidates of one kind per row, S sampled tokens.
_CHUNK = (
    1 << 16
)  # candidates are ranked in slices of about this many weights, which stay in the processor's cache


_HUGE = 1e30


_Swap = tuple[
    Tensor, Tensor, Tensor
]  # per row [R]: the column grown, the column pruned, whether the row takes part


class _Rows(NamedTuple):
    """Some rows: dense weights, pruned weights, mask, and the score that chose the mask, all [R, C]."""

    dense: Tensor
    weight: Tensor
    keep: Tensor
    score: Tensor

    def slices(self) -> list[_Rows]:
        """Groups of rows small enough for the cache (all of them on a GPU)."""
        size = max(1, _CHUNK // self.keep.shape[1]) if self.keep.is_cpu else len(self.keep)
        return [_Rows(*parts) for parts in zip(*(t.split(size) for t in self), strict=True)]


class DSnoT(Step):
    """Moves the mask by swaps; unstructured and N:M, from any initial mask.

    The expected error of a row is `sum_j (W_ij - W'_ij) * mean_j * L` over its inputs, L tokens per sequence; for a mask alone that is
    the paper's sum over pruned weights, and after a pruner that moved the kept weights (SparseGPT) it counts their change too.
    With `verified`, each row takes only as many cycles (possibly none) as best lower its actual output error on a sample of the
    calibration inputs, and none unless they lower it by `margin`; that error never rises. Without it this is the published algorithm.
    """

    changes = "mask"
    visits = 100

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`max_cycles`: swaps per row at most; `share`: the same as a share of the inputs (the paper's 50 of 4096 by default).

        `threshold`: stop at this expected error, in per-sequence units; `power`: exponent of the variance when growing;
        `margin`: the least share by which swaps must lower a row's sampled error (and its spread) to be taken;
        `variance`: `within` sequences (as the published code) or `total`; `walk_on`: a row with no kept weight of the needed sign left
        goes on with those of the other sign, highest score first, as the published code does (else it stops).
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
        return (
            Need.MEAN | Need.SECOND_MOMENT | variance | (Need.SAMPLE if self.config.verified else Need.NONE)
        )

    def apply(self, job: Job, pruned: Pruned) -> Pruned:
        stats = job.stats
        shift = stats.mean * stats.sequence_length
        variance = stats.within_variance if self.config.variance == "within" else stats.variance
        # A constant feature has variance 0: the floor keeps its rank highest without dividing by zero.
        spread = variance.clamp_min(torch.finfo(torch.float32).tiny ** 0.5).pow(self.config.power)
        rows = _Rows(job.weight, pruned.weight, pruned.keep, pruned.score)
        weight, keep = pruned.weight.clone(), pruned.keep.clone()
        for grown, dropped, done in self._swaps(job, rows, shift, shift / spread):
            # A row that takes no part writes back what it has: no data-dependent shapes, so no wait for the device.
            for matrix, come, gone in (
                (keep, torch.ones_like(done), torch.zeros_like(done)),
                (weight, _pick(job.weight, grown), 0.0),
            ):
                matrix.scatter_(1, grown[:, None], torch.where(done, come, _pick(matrix, grown))[:, None])
                matrix.scatter_(1, dropped[:, None], torch.where(done, gone, _pick(matrix, dropped))[:, None])
        return Pruned(weight, keep, pruned.score, pruned.notes)

    def _swaps(self, job: Job, rows: _Rows, shift: Tensor, urge: Tensor) -> list[_Swap]:
        """Per cycle: the column each row grows, the one it prunes, and whether it takes part, [R] each."""
        columns, width = rows.keep.shape[1], job.pattern.width
        cycles = min(self.config.max_cycles, max(1, int(self.config.share * columns)))
        grow = _GrowCandidates(rows, urge, cycles)
        prune = (
            _GroupCandidates(rows, width)
            if width > 1
            else _SignCandidates(rows, shift, job.stats.second_moment.sqrt(), cycles, self.config.walk_on)
        )
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
            best = _best_cycles(rows, job.stats.sample, self.config.margin, swaps)
            swaps = [
                (grown, dropped, done & (cycle < best)) for cycle, (grown, dropped, done) in enumerate(swaps)
            ]
        return swaps


def _pick(matrix: Tensor, columns: Tensor) -> Tensor:
    """One entry per row, [R]."""
    return matrix.gather(1, columns[:, None]).squeeze(1)


class _Queue:
    """At most k candidate columns per row, best first, each used once."""

    def __init__(self, best: Sequence[tuple[Tensor, Tensor]], sign: int) -> None:
        """`best`: values and columns [r, k] of some rows after others; only values of the given sign are candidates."""
        self._columns = torch.cat([columns for _, columns in best])
        self._valid = torch.cat([values * sign > 0 for values, _ in best])
        self._next = torch.zeros(len(self._valid), 1, dtype=torch.int64, device=self._valid.device)

    def next(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """The front candidate of every row [R] and whether there is one; it leaves the queue where `wanted`."""
        front = self._next.clamp_max(self._columns.shape[1] - 1)
        column = self._columns.gather(1, front).squeeze(1)
        valid = self._valid.gather(1, front).squeeze(1) & (self._next.squeeze(1) < self._columns.shape[1])
        self._next += wanted[:, None]
        return column, valid

    def then(self, other: _Queue) -> _Queue:
        """This queue, followed by another where it ends."""
        k = self._columns.shape[1]
        own = self._valid.sum(dim=1, keepdim=True)
        behind = torch.arange(k, device=own.device) - own
        mine, place = behind < 0, behind.clamp(0, k - 1)
        self._columns = torch.where(mine, self._columns, other._columns.gather(1, place))
        self._valid = mine | other._valid.gather(1, place)
        return self


class _GrowCandidates:
    """Pruned weights by expected contribution over variance: the largest against a positive error, the smallest against a negative."""

    def __init__(self, rows: _Rows, urge: Tensor, k: int) -> None:
        """`urge` [C]: expected contribution of a unit weight over the variance."""
        urge = urge.clamp(-_HUGE, _HUGE)  # a constant feature: first in the ranking, but finite
        self._positive, self._negative = _both_ends(rows, k, lambda part: part.dense * urge * ~part.keep)

    def next(self, positive: Tensor) -> tuple[Tensor, Tensor]:
        """The weight to grow in each row [R], and whether there is one; `positive`: the sign of the error."""
        return _either(positive, self._positive.next(positive), self._negative.next(~positive))


class _SignCandidates:
    """Unstructured: kept weights by ascending score, of the sign opposite to the expected error."""

    def __init__(self, rows: _Rows, shift: Tensor, norm: Tensor, k: int, walk_on: bool) -> None:
        # Signed 1 / score: the lowest scores of either sign stand at the two ends.
        inverse = torch.where(norm > 0, shift.sign() / norm, 0)
        self._if_negative, self._if_positive = _both_ends(
            rows, k, lambda part: (inverse / part.weight).masked_fill_(part.weight == 0, 0)
        )
        if walk_on:
            score = shift.sign() * norm
            highest_positive, highest_negative = _both_ends(rows, k, lambda part: part.weight * score)
            self._if_positive.then(highest_positive)
            self._if_negative.then(highest_negative)
        self._used = torch.zeros_like(rows.keep) if walk_on else None

    def next(self, positive: Tensor, grown: Tensor) -> tuple[Tensor, Tensor]:
        """The weight to prune in each row [R], and whether there is one."""
        column, valid = _either(positive, self._if_positive.next(positive), self._if_negative.next(~positive))
        return column, valid if self._used is None else valid & ~_pick(self._used, column)

    def used(self, columns: Tensor, active: Tensor) -> None:
        """Walking on, the two queues may meet: nothing is pruned twice."""
        if self._used is not None:
            self._used.scatter_(1, columns[:, None], (_pick(self._used, columns) | active)[:, None])


def _both_ends(rows: _Rows, k: int, value: Callable[[_Rows], Tensor]) -> tuple[_Queue, _Queue]:
    """The k largest values of each row, as far as positive, and the k smallest, as far as negative."""
    largest, smallest = [], []
    for part in rows.slices():
        ranked = value(part)
        k = min(k, ranked.shape[1])
        largest.append(ranked.topk(k, dim=1))
        smallest.append(ranked.topk(k, dim=1, largest=False))
    return _Queue(largest, 1), _Queue(smallest, -1)


def _either(condition: Tensor, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.where(condition, a[0], b[0]), torch.where(condition, a[1], b[1])


class _GroupCandidates:
    """N:M: the lowest initial score among the still-kept weights of the grown weight's own group."""

    def __init__(self, rows: _Rows, width: int) -> None:
        self._score = rows.score.masked_fill(~rows.keep, torch.inf)
        self._offsets = torch.arange(width, device=rows.keep.device)

    def next(self, positive: Tensor, grown: Tensor) -> tuple[Tensor, Tensor]:
        width = len(self._offsets)
        group = (grown // width * width)[:, None] + self._offsets
        lowest, place = self._score.gather(1, group).min(dim=1)
        return _pick(group, place), lowest.isfinite()

    def used(self, columns: Tensor, active: Tensor) -> None:
        """A dropped weight is not dropped again."""
        current = _pick(self._score, columns)
        self._score.scatter_(1, columns[:, None], torch.where(active, torch.inf, current)[:, None])


def _best_cycles(rows: _Rows, sample: Tensor, margin: float, swaps: Sequence[_Swap]) -> Tensor:
    """How many cycles each row takes, [R]: those that best lower its output error on sampled inputs [S, C], none unless by `margin`.

    What is lowered is the worse of two ratios to the first mask's: of the squared error, and of its spread around its own mean. DSnoT
    aims at the mean alone, and a mask that mends the mean by widening the spread costs perplexity.
    """
    inputs = sample.T.contiguous()  # [C, S]: a swap changes a row's errors by two of its rows
    # A swap's columns and what they change, [R, cycles] each; nothing where a row takes no part.
    grown, dropped = (torch.stack([swap[i] for swap in swaps], dim=1) for i in (0, 1))
    active = torch.stack([swap[2] for swap in swaps], dim=1)
    won, lost = -rows.dense.gather(1, grown) * active, rows.weight.gather(1, dropped) * active
    # As many rows at once as keep their errors in the cache through all cycles.
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
    """Squared error and squared spread of each row [r, S], [2, r]."""
    total, mean = torch.linalg.vecdot(error, error), error.mean(dim=1)
    return torch.stack([total, (total - mean.square() * error.shape[1]).clamp_min(0)])
