"""How a command ends early: one line, what is kept, the command that goes on, an exit code. Of several processes, one speaks."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import sys
from collections.abc import Callable
from typing import Any

from llmprune.machine.interrupts import INTERRUPTS

_FAILURES = (ValueError, RuntimeError, OSError, MemoryError, LookupError)


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
    if "WORLD_SIZE" not in os.environ or "llmprune.machine.processes" not in sys.modules:
        return True
    from llmprune.machine import processes

    return processes.speaks()


def _of_several(error: BaseException, line: str) -> str:
    if "WORLD_SIZE" not in os.environ or "llmprune.machine.processes" not in sys.modules:
        return line
    from llmprune.machine import processes

    return (
        "another process of this run ended, so the run cannot go on"
        if processes.lost_process(error)
        else line
    )


def reader_gone(closed: BaseException) -> None:
    """Nothing more can be written to stdout: no word of it, but of what is kept of a run."""
    with contextlib.suppress(
        OSError, ValueError
    ):  # the interpreter would complain of what is left in the buffer
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if hasattr(closed, "kept") and _speaks():
        print(f"llmprune: the output was closed; {_next_step(closed)}", file=sys.stderr)
