"""How a command that fails or is interrupted ends: with one line on stderr, and an exit code.

The line says what is kept of the run, and which command continues it. Of several processes, only one prints
it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from typing import Any

from llmprune.machine.interrupts import INTERRUPTS

_FAILURES = (ValueError, RuntimeError, OSError, MemoryError, LookupError)


def follows() -> bool:
    """Whether this is one of several processes, and not the first, which prints for all of them."""
    return os.environ.get("RANK", "0") != "0"


def guarded(work: Callable[[], Any], debug: bool, flags: Mapping[str, str] = {}) -> None:
    """Run a command. A failure or interrupt ends it with one line on stderr and an exit code.

    With `debug`, a failure shows its traceback instead; an error that is a fault of the program always does.
    Errors name parameters of Python; `flags` has the options by which the user gave them.
    """
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
                line = _with_flags(" ".join(str(error).split()), flags) or type(error).__name__
                if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                    line += "; make room on that disk"
                kept = f"; {_next_step(error)}" if hasattr(error, "kept") else ""
                print(f"llmprune: {_of_several(error, line)}{kept}", file=sys.stderr)
            raise SystemExit(1) from None


def _with_flags(line: str, flags: Mapping[str, str]) -> str:
    """An error with options in the place of Python's names.

    A name of one word may be a word of the language, so it counts only in `NAME must be ...`.
    """
    for name, flag in flags.items():
        line = re.sub(rf"^{name} must be(?=\s)", f"{flag} must be", line)
        if "_" in name:
            line = re.sub(rf"(?<![\w.\-]){name}(?![\w.=])", flag, line)
    return line


def _end_interrupted(error: BaseException) -> None:
    INTERRUPTS.told = True
    if _speaks():
        print(f"llmprune: interrupted; {_next_step(error)}", file=sys.stderr)
    raise SystemExit(130) from None


def _next_step(error: BaseException) -> str:
    """What is kept of a run that an error ended, and the command that continues it."""
    kept = getattr(error, "kept", None)
    if kept is None:
        own = str(error) if isinstance(error, KeyboardInterrupt) else ""
        return own or "nothing was changed in the output folder, run the same command again"
    # Resuming makes no sense with input that was refused, nor after a run that is finished.
    if not getattr(error, "resumable", True) or (isinstance(error, ValueError) and not INTERRUPTS.came):
        return str(kept)
    if "WORLD_SIZE" in os.environ:
        return f"{kept}; continue with the same command and --resume"
    arguments = [argument for argument in sys.argv[1:] if argument not in ("--resume", "--restart")]
    return f"{kept}; continue with: {shlex.join(['llmprune', *arguments, '--resume'])}"


def _speaks() -> bool:
    """Whether this process reports a failure: of several, only one does."""
    if "WORLD_SIZE" not in os.environ or "llmprune.machine.processes" not in sys.modules:
        return True
    from llmprune.machine import processes

    return processes.speaks()


def _of_several(error: BaseException, line: str) -> str:
    """The line to print for an error; where it only says that another process was lost, a plainer one."""
    if "WORLD_SIZE" not in os.environ or "llmprune.machine.processes" not in sys.modules:
        return line
    from llmprune.machine import processes

    lost = processes.lost_process(error)
    return "another process of this run ended, so the run cannot go on" if lost else line


def reader_gone(closed: BaseException) -> None:
    """End without output to stdout, whose reader is gone; only what is kept of a run is said on stderr."""
    # Else Python would complain at its end that it cannot write what is left in the buffer of stdout.
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if hasattr(closed, "kept") and _speaks():
        print(f"llmprune: the output was closed; {_next_step(closed)}", file=sys.stderr)
