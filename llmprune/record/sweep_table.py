"""The tables of a sweep: amounts as rows, methods as columns; Markdown, and CSV with every figure.

No time is in them, so that they have the same bytes however often the sweep was interrupted.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmprune.common import markdown as markdowns
from llmprune.record.figures import Record, direction
from llmprune.record.sweeps import DONE, FAILED, best_of

DENSE = "dense"
_MARKS = {FAILED: "failed", "waiting": "not yet"}


@dataclass(frozen=True)
class Table:
    """One score of all cells.

    Attributes:
        title: what it is.
        note: how it was measured, and in which direction it is better.
        methods: the heads of the columns.
        rows: the amount, then a cell for each method; the dense model first.
        best: (row, column) of the lowest perplexity of each row, without the dense one.
    """

    title: str
    note: str
    methods: list[str]
    rows: list[list[str]]
    best: set[tuple[int, int]]

    def marked(self, mark: Callable[[str], str]) -> list[list[str]]:
        """The rows, the best cells marked."""
        return [
            [mark(cell) if (r, c - 1) in self.best else cell for c, cell in enumerate(row)]
            for r, row in enumerate(self.rows)
        ]


def tables_of(record: Record) -> list[Table]:
    """A table for every text, then for every metric of every task."""
    protocol, dense = record["protocol"], record["dense"] or {"perplexity": {}, "tasks": {}}
    found = []
    for name, how in protocol["perplexity"].items():
        note = f"{how['windows']} windows of {how['window']} tokens, {how['dtype']}, lower is better"
        ranked = best_of(record["cells"], name)
        base = perplexity_text(dense["perplexity"].get(name, {}).get("value"))

        def scored(cell: Mapping[str, Any], name: str = name) -> str:
            return perplexity_text(cell["perplexity"].get(name))

        found.append(_table(record, (f"perplexity {name}", note), base, scored, set(ranked.values())))
    for task, how in protocol["tasks"].items():
        for metric, entry in dense["tasks"].get(task, {}).items():
            if metric == "protocol":
                continue
            note = f"{how['documents']} documents{direction(how, metric)}; with standard errors"

            def measured(cell: Mapping[str, Any], task: str = task, metric: str = metric) -> str:
                return _task_text(cell["tasks"].get(task, {}).get(metric))

            found.append(_table(record, (f"{task} {metric}", note), _task_text(entry), measured, set()))
    return found


def perplexity_text(value: float | None) -> str:
    """A perplexity in a table."""
    return "none" if value is None else f"{value:.2f}" if value < 1e4 else f"{value:.3g}"


def far_apart(dense: float, values: Sequence[float]) -> bool:
    """Whether perplexities need a logarithmic axis."""
    return max(values) > 8.0 * min(dense, *values)


def _task_text(entry: Mapping[str, Any] | None) -> str:
    if not entry or entry.get("value") is None:
        return "none"
    error = f" ± {entry['stderr']:.3f}" if entry.get("stderr") is not None else ""
    return f"{entry['value']:.3f}{error}"


def _table(
    record: Record,
    about: tuple[str, str],
    dense: str,
    scored: Callable[[Mapping[str, Any]], str],
    best: set[str],
) -> Table:
    methods = list(dict.fromkeys(cell["method"] for cell in record["cells"]))
    amounts = amounts_of(record["cells"])
    cells = {(cell["amount"], cell["method"]): cell for cell in record["cells"]}
    rows, marked = [[DENSE, *[dense] * len(methods)]], set()
    for amount in amounts:
        row = [amount]
        for column, method in enumerate(methods):
            cell = cells.get((amount, method))
            status = cell["status"] if cell else ""
            row.append(scored(cell) if cell and status == DONE else _MARKS.get(status, ""))
            if cell and cell["name"] in best:
                marked.add((len(rows), column))
        rows.append(row)
    return Table(*about, methods, rows, marked)


def amounts_of(cells: Iterable[Mapping[str, Any]]) -> list[str]:
    """The amounts in ascending order: sparsities first, then patterns."""
    found = {cell["amount"]: (":" in cell["amount"], cell["sparsity"], cell["amount"]) for cell in cells}
    return sorted(found, key=lambda amount: found[amount])


def markdown(record: Record) -> str:
    """The tables in Markdown, the best of every row bold."""
    lines = [f"# Sweep of {record['model']['source']}", ""]
    for table in tables_of(record):
        lines += [f"**{table.title}** ({table.note})", ""]
        lines += [markdowns.table(["", *table.methods], table.marked(lambda cell: f"**{cell}**")), ""]
    failed = [cell for cell in record["cells"] if cell["status"] == FAILED]
    lines += [f"- {cell['name']} failed: {markdowns.escaped(cell['error'])}" for cell in failed]
    return "\n".join(lines).rstrip() + "\n"


def csv_table(record: Record) -> str:
    """A row for the dense model and for every cell, with every figure in full; a column per score."""
    rows = figures_of(record)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def figures_of(record: Record) -> list[Record]:
    """The figures of the dense model and of every cell as flat rows, without times."""
    dense = record["dense"]
    rows = []
    if dense:
        ppl = {name: entry["value"] for name, entry in dense["perplexity"].items()}
        first = {
            "name": DENSE,
            "method": DENSE,
            "amount": "0",
            "pattern": "",
            "sparsity": 0.0,
            "status": DONE,
        }
        rows.append({**first, "sparsity_reached": 0.0, **_scores(ppl, dense["tasks"])})
    for cell in record["cells"]:
        plain = {key: cell[key] for key in ("name", "method", "amount", "pattern", "sparsity", "status")}
        if cell["status"] == DONE:
            plain |= {"sparsity_reached": cell["sparsity_reached"]}
            plain |= _scores(cell["perplexity"], cell["tasks"])
            plain |= {f"bytes {key}": value for key, value in cell["bytes"].items()}
            plain |= {"weights_kept": cell["weights_kept"]}
        rows.append(plain | ({"error": cell["error"]} if cell["status"] == FAILED else {}))
    return rows


def _scores(perplexity: Mapping[str, float], tasks: Mapping[str, Any]) -> Record:
    found: Record = {f"perplexity {name}": value for name, value in perplexity.items()}
    for task, metrics in tasks.items():
        for metric, entry in metrics.items():
            if metric != "protocol":
                found[f"{task} {metric}"] = entry["value"]
                found[f"{task} {metric} stderr"] = entry["stderr"]
    return found
