"""The record of a sweep, `sweep.json`: grid, scores of the dense model, and an entry for each cell."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from llmprune.checkpoint.contents import SCHEMA
from llmprune.checkpoint.journal import Identity
from llmprune.common.messages import first_line
from llmprune.evaluation.scores import Scores
from llmprune.literature.protocols import Run, side_by_side
from llmprune.record.figures import Record, skips

WAITING, DONE, FAILED = "waiting", "done", "failed"
_PATH = re.compile(r"(?<![\w/:.])(?:~|\.{1,2})?/(?:[^\s/'\":,;()]+/)*([^\s/'\":,;()]*)")


def opening(
    run: Record, grid: Record, keep: str, key: str, ranked_by: str | None, packed: bool = False
) -> Record:
    """The record of a sweep that has begun.

    Args:
        run: the record of one of its runs, see `record.opening`, for model and environment.
        grid: what was varied. keep: whose weights are kept.
        key: of the evaluation; the same for the same scores.
        ranked_by: the text whose perplexity ranks the cells; None where no text is scored.
        packed: whether the weights of the cells are stored packed.
    """
    return {
        "schema": SCHEMA,
        "model": run["model"],
        "grid": grid,
        "keep": keep,
        **({"format": "packed"} if packed else {}),
        "protocol": {"key": key, "ranked_by": ranked_by, "perplexity": {}, "tasks": {}},
        "dense": None,
        "cells": [],
        "environment": run["environment"],
        "finished": False,
        "seconds": {"total": 0.0},
    }


def identity(record: Record) -> Identity:
    """What must be the same for a sweep to go on: whatever else decides a score beside the cells."""
    environment = record["environment"]
    return {
        "model": record["model"]["digest"],
        "evaluation": record["protocol"]["key"],
        "keep": record["keep"],
        "format": record.get("format", "dense"),
        "versions": {name: environment["versions"][name] for name in ("llmprune", "torch", "transformers")},
        "dtype": environment["dtype"],
        "device": environment["device"].partition(",")[0],
    }


def waiting(name: str, about: tuple[str, str], recipe: Record, key: str, digest: str) -> Record:
    """The entry of a cell before its work. `about`: its method and amount. `digest`: of its tokens."""
    return {
        "name": name,
        "method": about[0],
        "amount": about[1],
        "pattern": recipe["pattern"],
        "sparsity": recipe["sparsity"],
        "status": WAITING,
        "key": hashlib.sha256(f"{key} {digest}".encode()).hexdigest(),
        "recipe": recipe,
        "calibration": digest,
        "folder": f"cells/{name}",
        "weights_kept": False,
    }


def done(entry: Record, record: Record) -> Record:
    """The entry of a finished cell, from the record of its run."""
    scores, totals = record["evaluation"], record["totals"]
    tasks = {
        task: {
            metric: {"value": value["pruned"], "stderr": value["stderr"]}
            for metric, value in metrics.items()
            if metric != "protocol"
        }
        for task, metrics in scores["tasks"].items()
    }
    return {key: value for key, value in entry.items() if key != "error"} | {
        "status": DONE,
        "recipe": record["recipe"],
        "perplexity": {name: value["pruned"] for name, value in scores["perplexity"].items()},
        "tasks": tasks,
        "sparsity_reached": totals["sparsity"],
        "weights": totals["weights"],
        "bytes": totals["bytes"],
        "seconds": totals["seconds"],
        "weights_kept": True,
        "texts": [text["pruned"] for text in record.get("samples", {}).get("texts", [])],
    }


def failed(entry: Record, error: BaseException) -> Record:
    """The entry of a cell that failed, with the error in one line, without local paths."""
    return {**entry, "status": FAILED, "error": without_paths(error_line(error))}


def error_line(error: BaseException) -> str:
    """An error in one line; one that is a fault of the program with its type."""
    known = isinstance(error, (ValueError, RuntimeError, OSError, MemoryError))
    line = first_line(error)
    return line if known or line == type(error).__name__ else f"{type(error).__name__}: {line}"


def without_paths(text: str) -> str:
    """The text with the last part of every path in the place of the path."""
    return _PATH.sub(lambda found: found[1] or "/", text)


def with_dense(record: Record, scores: Scores) -> Record:
    """The record with the scores of the dense model, and with the protocols."""
    protocol = record["protocol"] | {
        "perplexity": {name: entry["protocol"] for name, entry in scores.perplexity.items()},
        "tasks": {name: metrics["protocol"] for name, metrics in scores.tasks.items()},
    }
    return record | {"dense": dataclasses.asdict(scores), "protocol": protocol}


def scores_of(record: Record) -> Scores | None:
    """The scores of the dense model, read back."""
    dense = record["dense"]
    return Scores(dense["perplexity"], dense["tasks"], dense["seconds"]) if dense else None


def best_of(cells: Iterable[Mapping[str, Any]], ranked_by: str | None) -> dict[str, str]:
    """The cell with the lowest perplexity of every amount, amount -> name; the first of equal ones.

    Of an amount only those are ranked that prune the most weights: to leave matrices dense is no merit.
    """
    scored = [
        cell
        for cell in cells
        if cell["status"] == DONE and (cell.get("perplexity") or {}).get(ranked_by) is not None
    ]
    most: dict[str, int] = {}
    for cell in scored:
        most[cell["amount"]] = max(cell["weights"], most.get(cell["amount"], 0))
    best: dict[str, Mapping[str, Any]] = {}
    for cell in scored:
        value = cell["perplexity"][ranked_by]
        if cell["weights"] < most[cell["amount"]]:
            continue
        if cell["amount"] not in best or value < best[cell["amount"]]["perplexity"][ranked_by]:
            best[cell["amount"]] = cell
    return {amount: cell["name"] for amount, cell in best.items()}


def published_beside(record: Record) -> list[dict[str, Any]]:
    """What papers published of the model, beside the finished cells at the same sparsity."""
    done = [cell for cell in record["cells"] if cell["status"] == DONE]
    return side_by_side({cell["name"]: _as_run(record, cell) for cell in done})


def _as_run(record: Record, cell: Mapping[str, Any]) -> Run:
    """A finished cell, with its scores as the record of its run has them."""
    dense, protocol = record["dense"], record["protocol"]
    texts = {
        name: {
            "dense": dense["perplexity"][name]["value"],
            "pruned": value,
            "protocol": protocol["perplexity"][name],
        }
        for name, value in cell["perplexity"].items()
    }
    tasks = {
        task: {
            "protocol": protocol["tasks"][task],
            **{
                metric: {"dense": dense["tasks"][task][metric]["value"], "pruned": entry["value"]}
                for metric, entry in metrics.items()
            },
        }
        for task, metrics in cell["tasks"].items()
    }
    return Run(
        model=record["model"]["source"],
        pattern=cell["pattern"],
        sparsity=cell["sparsity_reached"],
        evaluation={"perplexity": texts, "tasks": tasks},
        partly=skips(cell["recipe"]),
    )


def with_kept(record: Record, holds: Callable[[str], bool]) -> Record:
    """The record where `weights_kept` of every finished cell says what `keep` asks for.

    Args:
        record: of the sweep.
        holds: whether the weights of a cell are there: one that was beaten by a cell that is lost has none.
    """
    best = set(best_of(record["cells"], record["protocol"]["ranked_by"]).values())
    keep = record["keep"]

    def kept(cell: Record) -> bool:
        wanted = keep == "all" or (keep == "best" and cell["name"] in best)
        return cell["status"] == DONE and wanted and holds(cell["name"])

    return record | {"cells": [{**cell, "weights_kept": kept(cell)} for cell in record["cells"]]}


def with_cell(record: Record, entry: Record) -> Record:
    """The record with a new entry of a cell."""
    return record | {"cells": [entry if c["name"] == entry["name"] else c for c in record["cells"]]}


def names_of(cells: Sequence[Mapping[str, Any]], status: str) -> list[str]:
    """The names of the cells with a status."""
    return [cell["name"] for cell in cells if cell["status"] == status]


def as_json(record: Record) -> bytes:
    """The record as the file holds it."""
    return json.dumps(record, indent=1).encode() + b"\n"
