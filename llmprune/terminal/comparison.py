"""Prints a comparison: the table, what is not ranked, what differs, and how the masks overlap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmprune.comparison import tables
from llmprune.comparison.comparing import Comparison
from llmprune.comparison.differences import shortened
from llmprune.comparison.writing import PAGE, SHEET, TABLE
from llmprune.terminal.console import Screen
from llmprune.terminal.literature import print_beside

_FEW = 3  # runs whose values stand in one line, in the order of the table
_MOST = 12  # fields that differ, and pairs of masks, that the screen lists; the page has all


def print_comparison(console: Screen, found: Comparison, output: Any) -> None:
    """Print a comparison, and where its page is."""
    head, rows = tables.cells(found)
    console.verbatim()
    console.table(tables.title(found), rows, head)
    for line in tables.notes(found):
        console.say(line)
    _differences(console, found)
    _overlap(console, found)
    print_beside(console, found["published"])
    if output is not None:
        console.verbatim()
        console.table("Written", [("page", f"{output}/{PAGE}"), ("tables", f"{output}/{TABLE}, {SHEET}")])


def _differences(console: Screen, found: Comparison) -> None:
    names = [run["name"] for run in found["runs"]]
    fields = found["differences"]
    if not fields:
        return
    console.verbatim()
    rows = [row for field in fields[:_MOST] for row in _values(field, names)]
    console.table("What differs", rows)
    if len(fields) > _MOST:
        console.say(f"and {len(fields) - _MOST} more fields, on the page")


def _values(field: Mapping[str, Any], names: Sequence[str]) -> list[tuple[str, str, str]]:
    """The values of a field: of few runs in their order, else each with the runs that have it, the most
    common one without them.
    """
    if len(names) <= _FEW:
        return [(field["field"], " | ".join(shortened(field["values"][name]) for name in names), "")]
    by_value: dict[str, list[str]] = {}
    for name in names:
        by_value.setdefault(field["values"][name], []).append(name)
    ordered = sorted(by_value.items(), key=lambda one: -len(one[1]))
    others = len(ordered[0][1]) > 2 and len(ordered[0][1]) > len(ordered[1][1])
    return [
        (
            field["field"] if not place else "",
            shortened(value),
            "all others" if others and not place else ", ".join(own),
        )
        for place, (value, own) in enumerate(ordered)
    ]


def _overlap(console: Screen, found: Comparison) -> None:
    pairs = found["overlap"]
    if not pairs:
        return
    console.verbatim()
    rows = [
        (f"{pair['a']} and {pair['b']}", f"{pair['agree']:.2%}", f"{pair['jaccard']:.3f}", "")
        for pair in pairs[:_MOST]
    ]
    console.table("Masks", rows, ("", "entries alike", "Jaccard", ""))
    if len(pairs) > _MOST:
        console.say(f"and {len(pairs) - _MOST} more pairs, on the page")
