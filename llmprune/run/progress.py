"""Progress of pruning: a step per block, and notes on how long the rest will take.

The first note comes after the first block, others where the estimate has changed much.
"""

from __future__ import annotations

import statistics
import time
from collections import deque

from llmprune.common.messages import duration
from llmprune.contracts import Reporter

_CHANGED = 1.5  # times as long as was told last, or as short,
_NOTEWORTHY = 5.0  # and by so many seconds at least
_RENEWALS = 3  # at most, after the first
_RECENT = 3  # blocks that count: what else the machine is busy with changes
_LIGHT = "dsnot"


class Progress:
    """Reports every finished block.

    Args:
        blocks: how many the model has. done: blocks that an earlier run has finished.
        limit: seconds the user expects pruning to take at most; None: no such limit.
        recipe: its name, for the advice where pruning will take longer.
    """

    def __init__(self, reporter: Reporter, blocks: int, done: int, limit: float | None, recipe: str) -> None:
        self._reporter, self._blocks, self._limit, self._recipe = reporter, blocks, limit, recipe
        self._started = self._last = time.monotonic()
        for _ in range(done):
            reporter.step()
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._end: float | None = None  # seconds from the start to the end, as told last
        self._renewals, self._warned = 0, False

    def block(self, number: int) -> None:
        """Block `number`, from 1, is done."""
        now = time.monotonic()
        self._recent.append(now - self._last)
        self._last = now
        if number < self._blocks:
            self._estimate(number, now - self._started)
        self._reporter.step()

    def _estimate(self, number: int, passed: float) -> None:
        left = self._blocks - number
        rest = statistics.median(self._recent) * left  # one slow block changes nothing
        if self._end is None:
            # The first block took the replay of finished ones too: then the estimate is an upper bound.
            self._end = passed + rest
            self._reporter.note(
                f"block {number} done after {passed:.1f} s; about {duration(rest)} for the other {left}"
            )
        elif self._renewals < _RENEWALS and self._differs(rest, self._end - passed):
            self._end = passed + rest
            self._renewals += 1
            rest_in_words = f"now about {duration(rest)} for the other {left}"
            self._reporter.note(f"block {number} done after {duration(passed)}; {rest_in_words}")
        self._hold_against_limit(passed + rest)

    @staticmethod
    def _differs(rest: float, told: float) -> bool:
        least, most = sorted((max(rest, 1e-9), max(told, 1e-9)))
        return most > _CHANGED * least and most - least > _NOTEWORTHY

    def _hold_against_limit(self, whole: float) -> None:
        if self._limit is None or self._warned or whole <= self._limit:
            return
        self._warned = True
        lighter = "fewer --samples" if self._recipe == _LIGHT else f"--recipe {_LIGHT} or fewer --samples"
        self._reporter.note(
            f"pruning will take about {duration(whole)}, more than the time limit "
            f"of {duration(self._limit)}: Ctrl-C keeps the finished blocks for --resume; "
            f"{lighter} would be faster, begun anew; with a higher --time-limit this is not said"
        )
