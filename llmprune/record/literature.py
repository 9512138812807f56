"""Published figures beside our own, on the pages of sweeps and comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmprune.pages.document import Markup, Section, element, escaped, joined, paragraph
from llmprune.pages.tables import Cell, breakable, table

_TOLD = (
    "What papers published of the same model at the same sparsity; in brackets the dense model's. They rank "
    "with ours only where the protocol is the same."
)
_HEAD = ("paper", "method", "sparsity", "figure", "published", "ours", "protocol")


def published_section(rows: Sequence[Mapping[str, Any]]) -> list[Section]:
    """A table of published figures, each with ours of every run; nothing without figures.

    Args:
        rows: what `side_by_side` returns.
    """
    if not rows:
        return []
    models = ", ".join(dict.fromkeys(row["model"] for row in rows))
    caption = f"Published figures of {models} beside ours"
    shown = table(_HEAD, [_row(row) for row in rows], caption, sortable=True)
    return [Section("Published figures", paragraph(_TOLD) + shown)]


def _row(row: Mapping[str, Any]) -> list[object]:
    ours = row["ours"]
    measured = [own["value"] for own in ours if own["value"] is not None]
    return [
        element("a", row["paper"], href=row["url"]) + f", {row['where']}",
        row["method"],
        row["amount"],
        row["figure"],
        Cell(_number(row["published"], row["published_dense"]), row["published"]),
        Cell(_ours(ours), measured[0] if measured else None),
        element("span", joined(protocols_of(ours)), title=row["theirs"]),
    ]


def protocols_of(ours: Sequence[Mapping[str, Any]]) -> list[str]:
    """The protocol of our runs beside a figure: once where it is the same, else of each run."""
    found = list(dict.fromkeys(own["protocol"] for own in ours))
    return found if len(found) == 1 else [f"{own['run']}: {own['protocol']}. " for own in ours]


def _ours(ours: Sequence[Mapping[str, Any]]) -> Markup:
    """Our figures, a line for each run."""
    if all(own["value"] is None for own in ours):
        return escaped("not measured")
    return joined(
        element("div", breakable(own["run"]) + f" {_number(own['value'], own['dense'])}") for own in ours
    )


def _number(value: float | None, dense: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{value:,.2f}" + (f" ({dense:,.2f})" if dense is not None else "")
