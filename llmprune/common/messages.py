"""Values, sizes and errors as text for one-line messages to the user."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def shown(value: Any) -> str:
    """A value as it is quoted in a message: on one line, at most 120 characters."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # too deep, or a number of too many digits
        text = f"a {type(value).__name__}"
    text = " ".join(line.strip() for line in text.splitlines())  # the repr of arrays and modules has several
    return text if len(text) <= 120 else text[:117] + "..."


def size_text(count: int) -> str:
    """A number of bytes in megabytes or gigabytes, with its unit."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def first_line(error: BaseException, most: int = 200) -> str:
    """The first line of an error's message, at most `most` characters; without a message, its type's name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:most]


def is_failure(error: BaseException) -> bool:
    """Whether an error is a failure, rather than the user's wish to stop (`KeyboardInterrupt`, `SystemExit`).

    A panic in a library written in Rust is a failure although it is no `Exception`.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def nearest(kind: str, name: str, available: Iterable[str], told: str = "") -> ValueError:
    """The error for an unknown name: it quotes the name, the names most like it, and all available names.

    `told`: what is available in other words, where the names are too many.
    """
    return ValueError(f"unknown {kind} {shown(name)}: {alternatives(name, available, told)}")


def alternatives(name: str, available: Iterable[str], told: str = "") -> str:
    """The names most like one that is not there, and all available names; see `nearest`."""
    names = sorted(available)
    close = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(c) for c in close)}? " if close else ""
    return f"{hint}available: {told or ', '.join(names)}"


def duration(seconds: float) -> str:
    """A time in words, such as "2 min 5 s"; at least a second."""
    seconds = max(1.0, seconds)
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
