"""Prints what came of comparing and checking keep masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmprune.terminal.console import Screen

_NAMED = 6  # names that one line lists


def print_diff(console: Screen, found: Mapping[str, Any]) -> None:
    """Print two sets of masks side by side."""
    rows = [(*_row(m["name"], m), " x ".join(map(str, m["shape"]))) for m in found["matrices"]]
    head = ("matrix", "agree", "overlap", "Jaccard", "pruned A", "pruned B", "shape")
    console.verbatim()
    console.table("Masks", [("A", found["a"]), ("B", found["b"])])
    console.verbatim()
    console.table("", [*rows, (*_row("overall", found), "")], head)
    for side, other in (("a", "B"), ("b", "A")):
        _name_some(console, f"not in {other}", found[f"only_{side}"])


def _row(name: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
    shares = (f"{entry[key]:.4f}" for key in ("agree", "overlap", "jaccard"))
    return (name, *shares, f"{entry['pruned_a']:,}", f"{entry['pruned_b']:,}")


def print_check(console: Screen, found: Mapping[str, Any]) -> None:
    """Print how many pruned weights of a checkpoint are filled."""
    rows = [
        (m["name"], f"{m['pruned']:,}", f"{m['filled']:,}", " x ".join(map(str, m["shape"])))
        for m in found["matrices"]
    ]
    rows.append(("overall", f"{found['pruned']:,}", f"{found['filled']:,}", ""))
    console.verbatim()
    console.table(f"Masks on {found['model']}", rows, ("matrix", "pruned", "filled", "shape"))
    _name_some(console, "without a mask", found["dense"])


def _name_some(console: Screen, what: str, names: Sequence[str]) -> None:
    if names:
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        console.say(f"{what}: {', '.join(names[:_NAMED])}{more}")
