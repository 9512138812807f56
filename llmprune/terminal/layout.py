"""Lays out tables and prose for a given width.

A table stands in columns where it fits. Where it does not, the notes (the last cells) go on lines of their
own; where even that is too wide, all cells do.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

GAP = 2
_LEAST_NOTE = 36  # columns a note needs beside its row; in fewer it would be hard to read


def folded(text: str, width: int, indent: int = 0) -> list[str]:
    """A text in lines of at most `width` columns; longer words (such as paths) are not broken."""
    room, lead = max(1, width - indent), " " * indent
    lines = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)
    return [lead + line for line in lines]


def table(rows: Sequence[Sequence[str]], width: int, head: Sequence[str] = ()) -> list[str]:
    """The lines of a table.

    Args:
        rows: the cells of each row; the last one is its note.
        width: columns there are.
        head: the names of the first columns.
    """
    heads = [*head, *[""] * (len(rows[0]) - len(head))] if rows else list(head)
    cells = [heads, *rows] if any(heads) else list(rows)
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads) - 1)]
    lead = sum(widths) + GAP * len(widths)
    longest = max((len(row[-1]) for row in cells), default=0)
    if width - lead >= min(longest, _LEAST_NOTE):
        return [line for row in cells for line in _beside(row, widths, lead, width)]
    if lead - GAP <= width:
        return [line for row in cells for line in (_row(row[:-1], widths), *folded(row[-1], width, GAP))]
    return [line for row in rows for line in _stacked(row, heads, width)]


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    return (" " * GAP).join(cell.ljust(size) for cell, size in zip(cells, widths, strict=True)).rstrip()


def _beside(row: Sequence[str], widths: Sequence[int], lead: int, width: int) -> list[str]:
    notes = folded(row[-1], width - lead) or [""]
    first = _row(row[:-1], widths).ljust(lead) + notes[0]
    return [first.rstrip(), *(" " * lead + note for note in notes[1:])]


def _stacked(row: Sequence[str], heads: Sequence[str], width: int) -> list[str]:
    """A row on several lines: the first cell, the others with the names of their columns, the note."""
    named = [f"{name} {cell}".strip() for name, cell in zip(heads[1:-1], row[1:-1], strict=True) if cell]
    note = f"{heads[-1]} {row[-1]}".strip() if row[-1] else ""
    return [*folded(row[0], width), *folded(", ".join(named), width, GAP), *folded(note, width, GAP)]
