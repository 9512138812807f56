"""How a command ends early: one line, what is kept, the command that goes on, an exit code. Of several processes, one speaks."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_AGAIN = 2.0  # seconds in which a repeated signal is the first one still: process managers send several
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_FAILURES = (ValueError, RuntimeError, OSError, MemoryError, LookupError)


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


def follows() -> bool:
    """Whether this is one of several processes, but not the one that speaks for them."""
    return os.environ.get("RANK", "0") != "0"


def guarded(work: Callable[[], Any], debug: bool) -> None:
    """Run a command; a failure becomes one line on stderr (a traceback with `debug`) and an exit code."""
    with INTERRUPTS.watched():
        try:
            work()
        except KeyboardInterrupt as interrupt:
            _end_interrupted(interrupt)
        except Exception as error:
            if INTERRUPTS.came:
                _end_interrupted(error)
            if debug or not isinstance(error, _FAILURES):
                raise
            if _speaks():
                line = " ".join(str(error).split()) or type(error).__name__
                if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                    line += "; make room on that disk"
                kept = f"; {_next_step(error)}" if hasattr(error, "kept") else ""
                print(f"llmprune: {_of_several(error, line)}{kept}", file=sys.stderr)
            raise SystemExit(1) from None


def _end_interrupted(error: BaseException) -> None:
    INTERRUPTS.told = True
    if _speaks():
        print(f"llmprune: interrupted; {_next_step(error)}", file=sys.stderr)
    raise SystemExit(130) from None


def _next_step(error: BaseException) -> str:
    """What an error left behind, and the command that goes on from there."""
    kept = getattr(error, "kept", None)
    if kept is None:
        own = str(error) if isinstance(error, KeyboardInterrupt) else ""
        return own or "nothing was changed in the output folder, run the same command again"
    # A refused input would be refused again, and what is finished has nothing to go on with.
    if not getattr(error, "resumable", True) or (isinstance(error, ValueError) and not INTERRUPTS.came):
        return str(kept)
    if "WORLD_SIZE" in os.environ:
        return f"{kept}; continue with the same command and --resume"
    arguments = [argument for argument in sys.argv[1:] if argument not in ("--resume", "--restart")]
    return f"{kept}; continue with: {shlex.join(['llmprune', *arguments, '--resume'])}"


def _speaks() -> bool:
    """Whether this process tells of a failure: of several, one does."""
    if "WORLD_SIZE" not in os.environ or "llmprune.processes" not in sys.modules:
        return True
    from llmprune import processes

    return processes.speaks()


def _of_several(error: BaseException, line: str) -> str:
    if "WORLD_SIZE" not in os.environ or "llmprune.processes" not in sys.modules:
        return line
    from llmprune import processes

    return "another process of this run ended, so the run cannot go on" if processes.lost_process(error) else line


def reader_gone(closed: BaseException) -> None:
    """Nothing more can be written to stdout: no word of it, but of what is kept of a run."""
    with contextlib.suppress(OSError, ValueError):  # the interpreter would complain of what is left in the buffer
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if hasattr(closed, "kept") and _speaks():
        print(f"llmprune: the output was closed; {_next_step(closed)}", file=sys.stderr)
