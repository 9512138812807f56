"""The page of a sweep, made of the parts that the report of a run is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmprune.checkpoint.contents import REPORT, SWEEP
from llmprune.common.messages import duration, size_text
from llmprune.pages.charts import Point, lines
from llmprune.pages.document import Markup, Section, element, joined, listed, page, paragraph
from llmprune.pages.tables import Cell, Tile, facts, table, tiles
from llmprune.record import texts as written
from llmprune.record.figures import Record
from llmprune.record.literature import published_section
from llmprune.record.sweep_table import Table, far_apart, perplexity_text, tables_of
from llmprune.record.sweeps import DONE, FAILED, best_of, published_beside


def html_page(record: Record) -> str:
    """One page: the best of every amount, curves, tables, cells, published figures, how it was measured."""
    tables = tables_of(record)
    parts = [
        Section("Tables", joined(map(_table, tables))),
        Section("All cells", _cells(record)),
        *_texts(record),
        *published_section(published_beside(record)),
        Section("How it was made", _facts(record)),
    ]
    version = record["environment"]["versions"].get("llmprune", "")
    about = f"Made by llmprune {version}. The record beside this page, {SWEEP}, has every figure in full."
    return page(f"Sweep of {record['model']['source']}", parts, _lead(record), about)


def _lead(record: Record) -> Markup:
    """The best cell of every amount in large type, what failed, and the curves."""
    text, cells = record["protocol"]["ranked_by"], record["cells"]
    by_name, best = {cell["name"]: cell for cell in cells}, best_of(cells, text)
    dense = record["dense"]["perplexity"].get(text) if record["dense"] else None
    shown = [Tile("dense", perplexity_text(dense["value"]), f"perplexity {text}")] if dense else []
    for amount, name in sorted(best.items(), key=lambda one: _order(by_name[one[1]])):
        cell = by_name[name]
        shown.append(Tile(f"best at {amount}", perplexity_text(cell["perplexity"][text]), cell["method"]))
    failed = [f"{cell['name']} failed: {cell['error']}" for cell in cells if cell["status"] == FAILED]
    done = sum(cell["status"] == DONE for cell in cells)
    said = paragraph(f"{done} of {len(cells)} cells are finished.", "soft")
    return joined([tiles(shown), said, listed(failed), _curves(record)])


def _order(cell: Mapping[str, Any]) -> tuple[bool, float, str]:
    return ":" in cell["amount"], cell["sparsity"], cell["amount"]


def _curves(record: Record) -> Markup:
    """Perplexity over sparsity: a line per method, and a point for each of its patterns."""
    text = record["protocol"]["ranked_by"]
    series: dict[str, list[Point]] = {}
    for cell in record["cells"]:
        value = (cell.get("perplexity") or {}).get(text)
        if cell["status"] == DONE and value is not None:
            pattern = f" {cell['amount']}" if ":" in cell["amount"] else ""
            series.setdefault(f"{cell['method']}{pattern}", []).append(
                Point(cell["sparsity"], value, note=cell["name"])
            )
    if not series:
        return Markup("")
    values = [point.y for points in series.values() for point in points]
    dense = record["dense"]["perplexity"][text]["value"]
    across = sorted(point.x for points in series.values() for point in points)
    series["dense"] = [
        Point(across[0], dense),
        *([Point(across[-1], dense)] if across[0] < across[-1] else []),
    ]
    names = ("sparsity", f"perplexity {text}")
    return lines(
        series, names, f"Perplexity {text} by sparsity, lower is better", log=far_apart(dense, values)
    )


def _table(shown: Table) -> Markup:
    """A table whose best cells are bold."""
    rows = [
        [element("strong", text) if (r, c - 1) in shown.best else text for c, text in enumerate(row)]
        for r, row in enumerate(shown.rows)
    ]
    note = shown.note + ("; bold is the best of its row" if shown.best else "")
    return table(("", *shown.methods), rows, shown.title) + paragraph(note, "soft")


def _cells(record: Record) -> Markup:
    """Every cell with its scores, size and time; to be sorted."""
    texts = list(record["protocol"]["perplexity"])
    head = ("cell", "sparsity", *(f"perplexity {text}" for text in texts), "seconds", "weights")
    return table(
        head, [_row(cell, texts) for cell in record["cells"]], "To be sorted by any column", sortable=True
    )


def _row(cell: Mapping[str, Any], texts: Sequence[str]) -> list[object]:
    if cell["status"] != DONE:
        blank = [Cell("", None)] * (len(texts) + 2)
        return [cell["name"], *blank, Cell(cell["status"], None)]
    link = element("a", cell["name"], href=f"{cell['folder']}/{REPORT}")
    scores = [
        Cell(perplexity_text(cell["perplexity"].get(text)), cell["perplexity"].get(text)) for text in texts
    ]
    size, seconds = cell["bytes"]["written"], cell["seconds"]["total"]
    reached = Cell(f"{cell['sparsity_reached']:.4f}", cell["sparsity_reached"])
    return [
        Cell(link, cell["name"]),
        reached,
        *scores,
        Cell(f"{seconds:,.1f}", seconds),
        Cell(size_text(size) if cell["weights_kept"] else "not kept", size),
    ]


def _texts(record: Record) -> list[Section]:
    """What the dense model and the best cell of every amount write; the others' reports have theirs."""
    samples = record.get("samples", {})
    if "texts" not in samples:
        return written.section(record, {})
    best = set(best_of(record["cells"], record["protocol"]["ranked_by"]).values())
    cells = [cell for cell in record["cells"] if cell.get("texts") and (not best or cell["name"] in best)]
    shown = [
        text | {cell["name"]: cell["texts"][place] for cell in cells if place < len(cell["texts"])}
        for place, text in enumerate(samples["texts"])
    ]
    names = {"dense": "dense", **{cell["name"]: cell["name"] for cell in sorted(cells, key=_order)}}
    return written.section({"samples": samples | {"texts": shown}}, names)


def _facts(record: Record) -> Markup:
    """What a repetition should have the same."""
    model, environment, grid = record["model"], record["environment"], record["grid"]
    varied = {key: values for key, values in grid.items() if key != "settings" and values} | grid["settings"]
    rows = [
        ("model", f"{model['source']} ({model['parameters']:,} parameters)"),
        *((key, ", ".join(map(str, values))) for key, values in varied.items()),
        (
            "weights kept",
            {"all": "of all cells", "best": "of the best cell of each row"}.get(record["keep"], "none"),
        ),
        ("time", f"{duration(record['seconds']['total'])} in all"),
        ("device", f"{environment['device']}, {environment['dtype']}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in environment["versions"].items())),
    ]
    return facts(rows, "What was varied, and with what it was measured")
