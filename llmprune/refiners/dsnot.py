"""DSnoT (Zhang et al., arXiv 2310.08915): regrow and prune, one pair per row and cycle, until the expected error is gone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llmprune.contracts import Job, Need, Pruned, Step

# Legend: R rows, C columns, k candidates of one kind per row, S sampled tokens.
_CHUNK = 1 << 18  # rows are worked off in slices of about this many weights, which stay in the processor's cache


class _Rows(NamedTuple):
    """A slice of rows: dense weights, pruned weights, mask, and the score that ranks what to prune, all [R, C]."""

    dense: Tensor
    weight: Tensor
    keep: Tensor
    score: Tensor


class DSnoT(Step):
    """Moves the mask by swaps; unstructured and N:M, from any initial mask.

    The expected error of a row is `sum_j (W_ij - W'_ij) * mean_j * L` over its inputs, L tokens per sequence; for a mask alone that is
    the paper's sum over pruned weights, and after a pruner that moved the kept weights (SparseGPT) it counts their change too.
    With `verified`, each row takes only as many cycles (possibly none) as minimise its actual squared output error on a sample of the
    calibration inputs, so that error never rises. Without it this is the published algorithm.
    """

    changes = "mask"

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`max_cycles`: swaps per row at most; `share`: the same as a share of the inputs (the paper's 50 of 4096 by default).

        `threshold`: stop at this expected error, in per-sequence units; `power`: exponent of the variance when growing;
        `variance`: `within` sequences (as the published code) or `total`; `walk_on`: a row with no kept weight of the needed sign left
        goes on with those of the other sign, highest score first, as the published code does (else it stops).
        """

        max_cycles: int = 50
        share: float = 50 / 4096
        threshold: float = 0.1
        power: float = 1.0
        variance: str = "within"
        verified: bool = True
        walk_on: bool = False

        def __post_init__(self) -> None:
            if self.max_cycles < 1:
                raise ValueError(f"max_cycles must be at least 1, got {self.max_cycles}")
            if not 0 < self.share <= 1:
                raise ValueError(f"share must be in (0, 1], got {self.share}")
            if self.threshold < 0:
                raise ValueError(f"threshold must not be negative, got {self.threshold}")
            if self.variance not in ("within", "total"):
                raise ValueError(f"variance must be 'within' or 'total', got {self.variance!r}")

    @property
    def needs(self) -> Need:  # type: ignore[override]
        variance = Need.WITHIN_VARIANCE if self.config.variance == "within" else Need.VARIANCE
        return Need.MEAN | Need.SECOND_MOMENT | variance | (Need.SAMPLE if self.config.verified else Need.NONE)

    def apply(self, job: Job, pruned: Pruned) -> Pruned:
        stats, width = job.stats, job.pattern.width
        shift = stats.mean * stats.sequence_length
        variance = stats.within_variance if self.config.variance == "within" else stats.variance
        # A constant feature has variance 0: the floor keeps its rank highest without dividing by zero.
        spread = variance.clamp_min(torch.finfo(torch.float32).tiny ** 0.5).pow(self.config.power)
        norm = stats.second_moment.sqrt()
        keep = pruned.keep.clone()
        rows = max(1, _CHUNK // keep.shape[1]) if keep.is_cpu else keep.shape[0]
        for a in range(0, keep.shape[0], rows):
            part = slice(a, a + rows)
            score = pruned.score[part] if width > 1 else pruned.weight[part].abs() * norm
            self._refine(job, _Rows(job.weight[part], pruned.weight[part], keep[part], score), shift, spread)
        return Pruned(torch.where(pruned.keep, pruned.weight, job.weight) * keep, keep, pruned.score)

    def _refine(self, job: Job, rows: _Rows, shift: Tensor, spread: Tensor) -> None:
        """Swap in place in `rows.keep`."""
        columns, width = rows.keep.shape[1], job.pattern.width
        cycles = min(self.config.max_cycles, max(1, int(self.config.share * columns)))
        grow = _GrowCandidates(rows, shift, spread, cycles)
        prune = _GroupCandidates(rows, width) if width > 1 else _SignCandidates(rows, shift, cycles, self.config.walk_on)
        difference = rows.dense - rows.weight
        expected = difference @ shift
        first_sign, active = expected.sign(), torch.ones_like(expected, dtype=torch.bool)
        errors = _SampledErrors(rows, difference, job.stats.sample) if self.config.verified else None
        swaps = []
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
            if errors is not None:
                errors.swap(grown, dropped, active)
        for cycle, (grown, dropped, done) in enumerate(swaps):
            if errors is not None:
                done = done & (cycle < errors.best_cycle)
            # A row that is done writes back what it has: no data-dependent shapes, so no wait for the device.
            rows.keep.scatter_(1, grown[:, None], (_pick(rows.keep, grown) | done)[:, None])
            rows.keep.scatter_(1, dropped[:, None], (_pick(rows.keep, dropped) & ~done)[:, None])


def _pick(matrix: Tensor, columns: Tensor) -> Tensor:
    """One entry per row, [R]."""
    return matrix.gather(1, columns[:, None]).squeeze(1)


class _Queue:
    """At most k candidate columns per row, best first, each used once: values +-inf mark the end."""

    def __init__(self, value: Tensor, k: int, largest: bool) -> None:
        values, self._columns = value.topk(min(k, value.shape[1]), dim=1, largest=largest)
        self._valid = values.isfinite()
        self._next = torch.zeros(len(value), 1, dtype=torch.int64, device=value.device)

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

    def __init__(self, rows: _Rows, shift: Tensor, spread: Tensor, k: int) -> None:
        value = (rows.dense * (shift / spread)).masked_fill_(rows.keep, 0)
        largest = torch.finfo(value.dtype).max
        value.clamp_(-largest, largest)  # a constant feature may overflow; it still ranks first
        self._positive = _Queue(value.masked_fill(value <= 0, -torch.inf), k, largest=True)
        self._negative = _Queue(value.masked_fill(value >= 0, torch.inf), k, largest=False)

    def next(self, positive: Tensor) -> tuple[Tensor, Tensor]:
        """The weight to grow in each row [R], and whether there is one; `positive`: the sign of the error."""
        return _either(positive, self._positive.next(positive), self._negative.next(~positive))


class _SignCandidates:
    """Unstructured: kept weights by ascending score, of the sign opposite to the expected error."""

    def __init__(self, rows: _Rows, shift: Tensor, k: int, walk_on: bool) -> None:
        contribution = rows.weight * shift
        not_negative, not_positive = contribution >= 0, contribution <= 0
        self._if_positive = _Queue(rows.score.masked_fill(not_negative, torch.inf), k, largest=False)
        self._if_negative = _Queue(rows.score.masked_fill(not_positive, torch.inf), k, largest=False)
        if walk_on:
            self._if_positive.then(_Queue(rows.score.masked_fill(not_positive, -torch.inf), k, largest=True))
            self._if_negative.then(_Queue(rows.score.masked_fill(not_negative, -torch.inf), k, largest=True))
        self._used = torch.zeros_like(rows.keep) if walk_on else None

    def next(self, positive: Tensor, grown: Tensor) -> tuple[Tensor, Tensor]:
        """The weight to prune in each row [R], and whether there is one."""
        column, valid = _either(positive, self._if_positive.next(positive), self._if_negative.next(~positive))
        return column, valid if self._used is None else valid & ~_pick(self._used, column)

    def used(self, columns: Tensor, active: Tensor) -> None:
        """Walking on, the two queues may meet: nothing is pruned twice."""
        if self._used is not None:
            self._used.scatter_(1, columns[:, None], (_pick(self._used, columns) | active)[:, None])


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


class _SampledErrors:
    """Follows each row's output error [R, S] on sampled inputs through the swaps: two columns per cycle."""

    def __init__(self, rows: _Rows, difference: Tensor, sample: Tensor) -> None:
        self._rows, self._inputs = rows, sample.T.contiguous()
        self._error = difference @ self._inputs
        self._lowest = self._error.square().sum(dim=1)
        self._cycle = 0
        self.best_cycle = torch.zeros(len(difference), dtype=torch.int64, device=difference.device)

    def swap(self, grown: Tensor, dropped: Tensor, active: Tensor) -> None:
        lost = _pick(self._rows.weight, dropped) * active
        won = _pick(self._rows.dense, grown) * active
        self._error += lost[:, None] * self._inputs[dropped] - won[:, None] * self._inputs[grown]
        self._cycle += 1
        now = self._error.square().sum(dim=1)
        better = now < self._lowest
        self._lowest = torch.where(better, now, self._lowest)
        self.best_cycle = torch.where(better, self._cycle, self.best_cycle)
