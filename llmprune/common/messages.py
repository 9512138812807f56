"""Finds the shipped data folders (`recipes`, `eval`) in a checkout and in an installed wheel alike."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def shown(value: Any) -> str:
    """A value from a file as it stands in a message: never longer than a line."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # too deep, or a number of too many digits
        text = f"a {type(value).__name__}"
    text = " ".join(line.strip() for line in text.splitlines())  # arrays and modules take several
    return text if len(text) <= 120 else text[:117] + "..."


def size_text(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def first_line(error: BaseException, most: int = 200) -> str:
    """What an error says, in a line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:most]


def is_failure(error: BaseException) -> bool:
    """Whether an error is one of a library, as opposed to the user's wish to stop; panics of libraries in Rust are no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def nearest(kind: str, name: str, available: Iterable[str]) -> ValueError:
    """The error for an unknown name: what was received, the nearest names and all of them."""
    names = sorted(available)
    close = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(c) for c in close)}? " if close else ""
    return ValueError(f"unknown {kind} {shown(name)}: {hint}available: {', '.join(names)}")
