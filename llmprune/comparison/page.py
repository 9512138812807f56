"""The page of a comparison, one file: its table, curves, what differs, masks, published figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmprune.common.messages import duration
from llmprune.comparison import tables
from llmprune.comparison.comparing import Comparison
from llmprune.comparison.differences import shortened
from llmprune.pages.charts import Point, lines
from llmprune.pages.document import (
    Markup,
    Section,
    abreast,
    element,
    escaped,
    listed,
    page,
    paragraph,
)
from llmprune.pages.tables import Cell, breakable, heat, table
from llmprune.record.literature import published_section
from llmprune.record.texts import section

_LONG = 40  # characters of a value, above which it is shortened in the table of differences
_OVERLAP = (
    "Of each pair of runs, the entries that both pruned over those that either pruned (Jaccard): 1 is the "
    "same masks; two masks that choose independently share about s / (2 - s) at sparsity s."
)


def comparison_page(comparison: Comparison, version: str) -> str:
    """The page.

    Args:
        comparison: what `compared` returns.
        version: of llmprune, for the foot.
    """
    sections = [
        *_curves(comparison),
        *_differences(comparison),
        *_overlap(comparison),
        *_texts(comparison),
        *published_section(comparison["published"]),
    ]
    return page(tables.title(comparison), sections, _lead(comparison), f"Made by llmprune {version}.")


def _lead(comparison: Comparison) -> Markup:
    """The table, and what must be said of it."""
    speeds = tables.measured(comparison)
    rows = [_dense(model, own, speeds) for model, own in tables.dense_scores(comparison)]
    rows += [_row(comparison, run, speeds) for run in comparison["runs"]]
    made = table(tables.head(comparison), rows, "Scores, size and time of every run", sortable=True)
    return made + listed(f"{note}." for note in tables.notes(comparison))


def _dense(model: str, own: Sequence[str], speeds: bool) -> list[object]:
    blank = [Cell("", None)] * (2 + speeds)
    return [breakable(model), "dense", Cell("", 0.0), *(Cell(text, None) for text in own), *blank]


def _row(comparison: Comparison, run: dict[str, Any], speeds: bool) -> list[object]:
    return [
        breakable(run["name"]),
        run["method"],
        Cell(tables.amount(run), run["sparsity"]),
        *(_score(score) for score in tables.scores_of(comparison, run["name"])),
        Cell(_noted(*tables.size(run)), run["bytes"]["packed"]),
        *([Cell(tables.speed(run), run["faster_by"])] if speeds else []),
        Cell(duration(run["seconds"]), run["seconds"]),
    ]


def _score(score: tables.Score) -> Cell:
    shown = f"{score.number} {score.mark}".strip()
    return Cell(_noted(element("b", shown) if score.rank == "*" else shown, score.error), score.value)


def _noted(figure: str, note: str) -> Markup:
    """A figure, and what is said of it below."""
    return escaped(figure) + (element("small", note) if note else "")


def _curves(comparison: Comparison) -> list[Section]:
    """Scores over sparsity and over bytes, a chart for every group of figures that may be ranked."""
    charts = [
        lines(
            {label: [Point(*point) for point in own] for label, own in found.points.items()},
            (name, found.title),
            f"{found.title} by {name}",
            log=found.title.startswith("perplexity"),
        )
        for across, name in tables.ACROSS.items()
        for found in tables.curves(comparison, across)
    ]
    return [Section("Curves", abreast(charts))] if charts else []


def _differences(comparison: Comparison) -> list[Section]:
    found = comparison["differences"]
    if len(comparison["runs"]) < 2:
        return []
    if not found:
        return [Section("What differs", paragraph("Recipe, calibration, model and machine are the same."))]
    names = [run["name"] for run in comparison["runs"]]
    rows = [
        [breakable(entry["field"]), *(_shortened(entry["values"][name]) for name in names)] for entry in found
    ]
    made = table(["field", *map(breakable, names)], rows, "Fields in which the runs differ")
    return [Section("What differs", element("div", made, class_="scroll"))]


def _shortened(value: str) -> Markup:
    """A value, of which a long one is cut and stands whole in its tip."""
    short = shortened(value)
    short = short if len(short) <= _LONG else short[: _LONG - 1] + "…"
    return breakable(value) if short == value else element("span", breakable(short), title=value)


def _texts(comparison: Comparison) -> list[Section]:
    """What the runs write, side by side."""
    found = comparison["texts"]
    if not found:
        return []
    names = dict.fromkeys(name for row in found for name in row["written"])
    dense = [name for name in names if name not in {run["name"] for run in comparison["runs"]}]
    order = {name: name for name in [*dense, *names]}
    texts = [{"prompt": row["prompt"], **row["written"]} for row in found]
    return section({"samples": {"tokens": max(row["tokens"] for row in found), "texts": texts}}, order)


def _overlap(comparison: Comparison) -> list[Section]:
    pairs = {(pair["a"], pair["b"]): pair for pair in comparison["overlap"]}
    if not pairs:
        return []
    names = [run["name"] for run in comparison["runs"] if any(run["name"] in pair for pair in pairs)]

    def of(a: str, b: str) -> dict[str, Any] | None:
        return pairs.get((a, b)) or pairs.get((b, a))

    values = [[(pair["jaccard"] if (pair := of(a, b)) else None) for b in names] for a in names]
    notes = [
        [(f"{pair['agree']:.2%} of all entries the same" if (pair := of(a, b)) else "") for b in names]
        for a in names
    ]
    made = heat(names, names, values, "Overlap of the masks", form=".3f", notes=notes)
    return [Section("Masks", paragraph(_OVERLAP) + abreast([made], "maps"))]
