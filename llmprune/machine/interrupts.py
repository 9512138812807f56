"""Turns SIGINT and SIGTERM into `KeyboardInterrupt`, also where a library swallows that exception."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_AGAIN = 2.0  # seconds within which a further signal is ignored: process managers send several in a row
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Raises `KeyboardInterrupt` on SIGINT and SIGTERM, and remembers that a signal came.

    A library may turn the `KeyboardInterrupt` into an error of its own or swallow it, above all while it is
    imported; `check` raises it again.

    Attributes:
        came: whether a signal came.
        told: set by the caller once the user was told of it; `check` then raises no more.
    """

    def __init__(self) -> None:
        self.came = self.told = False
        self._last = 0.0
        self._watching = False
        # A process pool ends its workers with SIGTERM. They must die of it at once, not raise an exception.
        os.register_at_fork(after_in_child=self._leave_child)

    def _leave_child(self) -> None:
        if self._watching:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch for the two signals inside the `with`; afterwards their former handlers are restored."""
        if self._watching:  # in an outer `with`, such as that around the whole program
            yield
            return
        self.came, self.told, self._last = False, False, 0.0
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        # A shell starts background jobs with SIGINT ignored; it must stay ignored.
        watched = [n for n in _SIGNALS if n == signal.SIGTERM or before[n] is not signal.SIG_IGN]
        for number in watched:
            signal.signal(number, self._interrupt)
        self._watching = True
        try:
            yield
        finally:
            self._watching = False
            for number in watched:
                signal.signal(number, before[number])

    def check(self) -> None:
        """Raise `KeyboardInterrupt` again if a signal came and the exception was swallowed."""
        if self._watching and self.came and not self.told:
            raise KeyboardInterrupt

    def _interrupt(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        repeated, self._last = self.came and now - self._last < _AGAIN, now
        self.came = True
        if not repeated:  # else the program is ending already
            raise KeyboardInterrupt


INTERRUPTS = Interrupts()  # one for the process, as signal handlers are
