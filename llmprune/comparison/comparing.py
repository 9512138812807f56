"""Everything a comparison says, as plain values: `compared`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmprune.comparison.differences import differences
from llmprune.comparison.entries import Entry
from llmprune.comparison.overlap import has_masks, overlaps
from llmprune.comparison.ranking import Group, differing, groups_of
from llmprune.literature.protocols import Run, side_by_side
from llmprune.record.figures import skips

SCHEMA = 2
Comparison = dict[str, Any]


def compared(entries: Sequence[Entry], overlap: bool, missing: Sequence[str] = ()) -> Comparison:
    """Runs side by side.

    Args:
        entries: the runs.
        overlap: whether the overlap of their masks is counted, which reads them all.
        missing: in sentences, what was named and is not among the runs.

    Returns:
        `runs` (per run what it is and cost), `scores` (per group of figures that may be ranked: `name`,
        `letter`, `protocol`, `model`, `best`, `level`, and `members` with value, dense value and error),
        `unranked` (why figures of one name are not ranked together),
        `missing` (what is not compared, in sentences), `differences` (field, and its value in
        each run), `overlap` (as `mask_diff` for every pair), `texts` (per prompt what the dense model and
        each run have written, where reports have texts), `published` (figures of papers
        beside ours, see `side_by_side`).
    """
    groups = groups_of(entries)
    return {
        "schema": SCHEMA,
        "runs": [_run(entry) for entry in entries],
        "scores": [_scores(group) for group in groups],
        "unranked": differing(groups),
        "missing": [*missing, *(_unmasked(entries) if overlap else [])],
        "differences": [
            {"field": key, "values": dict(zip((e.name for e in entries), values, strict=True))}
            for key, values in differences(entries)
        ],
        "overlap": overlaps(entries) if overlap else [],
        "texts": _texts(entries),
        "published": side_by_side({entry.name: _as_run(entry) for entry in entries}),
    }


def _run(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "model": entry.model,
        "method": entry.method,
        "pattern": entry.pattern,
        "sparsity": entry.sparsity,
        "weights": entry.record["totals"]["weights"],
        "format": entry.stored,
        "bytes": {"written": entry.written, "packed": entry.packed},
        "parameters": entry.record["model"]["parameters"],
        "faster_by": entry.faster_by,
        "seconds": entry.seconds,
    }


def _unmasked(entries: Sequence[Entry]) -> list[str]:
    """A sentence on the runs whose masks cannot be compared."""
    names = [entry.name for entry in entries if not has_masks(entry)]
    if not names or len(entries) < 2:
        return []
    return [
        f"Overlap is without {', '.join(names)}, whose masks are not at hand (as of cells without weights)"
    ]


def _as_run(entry: Entry) -> Run:
    record = entry.record
    return Run(
        model=entry.model,
        pattern=entry.pattern,
        sparsity=entry.sparsity,
        evaluation=record.get("evaluation", {}),
        trained="recovery" in record,
        partly=skips(record.get("recipe", {})),
    )


def _texts(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for entry in entries:
        samples = entry.record.get("samples", {})
        for text in samples.get("texts", []):
            row = found.setdefault(text["prompt"], {"prompt": text["prompt"], "tokens": 0, "written": {}})
            row["tokens"] = max(row["tokens"], samples["tokens"])
            if "dense" in text:
                row["written"].setdefault(f"dense {entry.model}", text["dense"])
            row["written"][entry.name] = text["pruned"]
    return list(found.values())


def _scores(group: Group) -> dict[str, Any]:
    return {
        "name": group.name,
        "letter": group.letter,
        "model": group.model,
        "protocol": dict(group.protocol),
        "best": sorted(group.best),
        "level": sorted(group.level),
        "members": {
            name: {"value": figure.value, "dense": figure.dense, "stderr": figure.stderr}
            for name, figure in group.members.items()
        },
    }
