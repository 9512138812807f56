"""SIGINT and SIGTERM as `KeyboardInterrupt`, remembered where a library swallows it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_AGAIN = 2.0  # seconds in which a repeated signal is the first one still: process managers send several


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Turns SIGINT and SIGTERM into KeyboardInterrupt and remembers that one came.

    A library that is being imported may turn the KeyboardInterrupt into an error of its own, or lose it.
    """

    def __init__(self) -> None:
        self.came = self.told = False
        self._last = 0.0
        self._watching = False
        # A pool of processes ends its workers with SIGTERM: they must die of it, not turn it into an exception of their own.
        os.register_at_fork(after_in_child=self._leave_child)

    def _leave_child(self) -> None:
        if self._watching:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch for the two signals inside the `with`; afterwards they do what they did before."""
        if self._watching:  # the program's start watches already
            yield
            return
        self.came, self.told, self._last = False, False, 0.0
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        # A shell starts background jobs with SIGINT ignored: that stays.
        mine = [n for n in _SIGNALS if n == signal.SIGTERM or before[n] is not signal.SIG_IGN]
        for number in mine:
            signal.signal(number, self._interrupt)
        self._watching = True
        try:
            yield
        finally:
            self._watching = False
            for number in mine:
                signal.signal(number, before[number])

    def check(self) -> None:
        """Raise `KeyboardInterrupt` where a signal came and something swallowed the exception."""
        if self._watching and self.came and not self.told:
            raise KeyboardInterrupt

    def _interrupt(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        repeated, self._last = self.came and now - self._last < _AGAIN, now
        self.came = True
        if not repeated:  # the way out is under way
            raise KeyboardInterrupt


INTERRUPTS = Interrupts()  # signal handlers belong to the process, and so does what they saw
