"""Draws a sweep: perplexity over sparsity, a line per method; N:M patterns as points of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmprune.record.canvas import canvas, png
from llmprune.record.figures import Record
from llmprune.record.sweep_table import far_apart
from llmprune.record.sweeps import DONE


def plot(record: Record) -> bytes | None:
    """A PNG; None where no cell has a perplexity."""
    name = record["protocol"]["ranked_by"]
    cells = [c for c in record["cells"] if c["status"] == DONE and c["perplexity"].get(name) is not None]
    if not cells or not record["dense"]:
        return None
    figure, (axes,) = canvas((6.4, 4.2))
    for number, method in enumerate(dict.fromkeys(cell["method"] for cell in record["cells"])):
        own = [cell for cell in cells if cell["method"] == method]
        _line(axes, method, own, name, f"C{number % 10}")
    dense = record["dense"]["perplexity"][name]["value"]
    axes.axhline(dense, color="#606060", linewidth=1, linestyle="--", label="dense")
    values = [cell["perplexity"][name] for cell in cells]
    if far_apart(dense, values):
        axes.set_yscale("log")
    axes.set(
        title=f"{record['model']['source']}: perplexity {name}", xlabel="sparsity", ylabel="lower is better"
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return png(figure, 130)


def _line(axes: Any, method: str, cells: list[Mapping[str, Any]], text: str, colour: str) -> None:
    """The line of a method through its sparsities, and a cross for each of its patterns."""
    plain = sorted((c["sparsity"], c["perplexity"][text]) for c in cells if ":" not in c["amount"])
    if plain:
        places, values = zip(*plain, strict=True)
        axes.plot(places, values, marker="o", color=colour, label=method)
    marks = "xP*sD^v"
    patterns = [cell for cell in cells if ":" in cell["amount"]]
    for number, cell in enumerate(patterns):
        axes.plot(
            [cell["sparsity"]],
            [cell["perplexity"][text]],
            marker=marks[number % len(marks)],
            linestyle="none",
            color=colour,
            label=f"{method} {cell['amount']}",
        )
