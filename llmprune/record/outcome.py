"""The first screen of the report: what came of the run, in scores and a few large figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmprune.common.messages import duration, size_text
from llmprune.pages.document import Markup, element, escaped, paragraph
from llmprune.pages.tables import Tile, table, tiles
from llmprune.record.figures import (
    ScoreRow,
    from_dense,
    last_model,
    method_of,
    score_rows,
    share_of_all,
    speed_measured,
)

Record = Mapping[str, Any]
SCORED_AFTER = ("evaluate dense", "evaluate start", "evaluate pruned")  # phases that score


def outcome(record: Record) -> Markup:
    """The lead of the report."""
    about = f"{method_of(dict(record))}. {record['model']['parameters']:,} parameters."
    return paragraph(about, "soft") + element("div", _scores(record) + tiles(_tiles(record)), class_="first")


def _scores(record: Record) -> Markup:
    rows = score_rows(record)
    if not rows:
        return paragraph("Not scored: made without evaluation.")
    trained = "recovery" in record
    begun = trained and not from_dense(rows)
    last = last_model(record, begun)
    head = ["score", "dense", *(["start"] if begun else []), last, "change"]
    gaps = begun and any(row.gap for row in rows)
    head += ["gap closed"] if gaps else []
    caption = f"Scores of the dense and the {last} model" + (
        "; start: the model that was trained" if begun else ""
    )
    shown = table(head, [_score(row, begun, gaps) for row in rows], caption)
    return element("div", shown, class_="scores", style=f"--figures: {len(head) - 1}")


def _score(row: ScoreRow, begun: bool, gaps: bool) -> list[object]:
    """The cells of a score: what is said beside a figure stands below it."""
    change, _, remark = row.change.partition(", ")
    cells: list[object] = [_noted(row.name, row.note), row.dense]
    cells += [row.start] if begun else []
    cells += [_noted(element("b", row.pruned), row.error), _noted(change, remark)]
    return [*cells, row.gap] if gaps else cells


def _noted(figure: object, note: str) -> Markup:
    return escaped(figure) + (element("small", note) if note else "")


def _tiles(record: Record) -> Sequence[Tile]:
    totals = record["totals"]
    sparsity = Tile(
        "Sparsity", f"{totals['sparsity']:.2%}", f"of the pruned matrices; {share_of_all(record)}"
    )
    return [sparsity, _size(record), _speed(record), _time(record)]


def _size(record: Record) -> Tile:
    sizes, form = record["totals"]["bytes"], record.get("format", {}).get("name")
    written, dense, packed = sizes["written"], sizes["dense"], sizes.get("packed")
    if form:
        share = f", {written / dense:.0%} of {size_text(dense)} dense" if dense else ""
        return Tile("Size on disk", size_text(written), f"{form}{share}")
    if packed is None or packed >= dense:
        return Tile("Size on disk", size_text(written), "stored densely, zeros included")
    return Tile(
        "Size on disk",
        size_text(written),
        f"stored densely; {size_text(packed)} packed ({packed / dense:.0%})",
    )


def _speed(record: Record) -> Tile:
    """How fast packed weights are, where that was measured; else why it was not."""
    tokens = record.get("speed", {}).get("tokens")
    if not tokens:
        why = speed_measured(record).removeprefix("not measured: ")
        return Tile("Speed", "not measured", why or "llmprune bench measures it")
    (first, *others) = tokens.items()
    rest = "".join(f", {entry['faster_by']:.2f} x at {n}" for n, entry in others)
    return Tile(
        "Speed, packed",
        f"{first[1]['faster_by']:.2f} x",
        f"the speed of dense at {first[0]} token{rest}: products of the largest matrices",
    )


def _time(record: Record) -> Tile:
    seconds, memory = record["totals"]["seconds"], record["totals"].get("peak_memory_bytes")
    scoring = sum(seconds.get(phase, 0.0) for phase in SCORED_AFTER)
    parts = [f"{duration(scoring)} of it scoring"] if scoring else []
    parts += [f"{size_text(memory)} of memory at the peak"] if memory else []
    return Tile("Time", duration(seconds["total"]), ", ".join(parts))
