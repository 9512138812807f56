"""Prints a sweep: its plan, and its tables at the end."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmprune.common.messages import duration
from llmprune.record.sweep_table import tables_of
from llmprune.record.sweeps import DONE, FAILED, best_of, published_beside
from llmprune.terminal.console import Screen
from llmprune.terminal.literature import print_beside
from llmprune.terminal.screen import next_steps


def print_plan(console: Screen, rows: Sequence[tuple[str, ...]], lines: Sequence[str]) -> None:
    """Print the cells of a dry run, and what they need together."""
    console.table("Cells, nothing was written", rows, ("cell", "about", "disk", ""))
    console.verbatim()
    for line in lines:
        console.say(line)


def print_sweep(console: Screen, record: Mapping[str, Any], output: Path) -> None:
    """Print the tables of a sweep, the lowest perplexity of each row marked, and what to do next."""
    console.verbatim()
    for table in tables_of(dict(record)):
        rows = [(*row, "") for row in table.marked("{} *".format)]
        console.table(f"Sweep, {table.title}", rows, ("", *table.methods, ""))
        marked = "; * is the best of its row" if table.best else ""
        console.say(f"{table.note}{marked}")
        console.verbatim()
    print_beside(console, published_beside(dict(record)))
    cells = record["cells"]
    done = [cell for cell in cells if cell["status"] == DONE]
    taken = sum(cell["seconds"]["total"] for cell in done)
    console.say(f"{len(done)} of {len(cells)} cells are finished; they took {duration(taken)} together")
    for cell in cells:
        if cell["status"] == FAILED:
            console.say(f"FAILED {cell['name']}: {cell['error']}", "bold")
    console.verbatim()
    next_steps(console, _steps(record, cells, output))


def _steps(
    record: Mapping[str, Any], cells: Sequence[Mapping[str, Any]], output: Path
) -> list[tuple[str, str]]:
    folder = shlex.quote(str(output))
    steps = [("see it", f"{folder}/report.html"), ("go on from", f"{folder}/table.csv")]
    best = best_of(cells, record["protocol"]["ranked_by"])
    chosen = next((c for c in cells if c["name"] in best.values() and c["weights_kept"]), None)
    if chosen is not None:
        path = shlex.quote(str(output / chosen["folder"]))
        steps += [
            ("score one", f"llmprune eval {path} --perplexity FILE"),
            ("measure", f"llmprune bench {path}"),
        ]
    return steps
