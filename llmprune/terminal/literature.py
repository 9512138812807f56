"""Prints figures that papers published: of a model, source by source, or which models have some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmprune.literature.figure import SEEN_IN, Protocol
from llmprune.literature.protocols import amount_of, protocol_words
from llmprune.literature.published import models, name_of
from llmprune.record.literature import protocols_of
from llmprune.terminal.console import Screen

Entry = Mapping[str, Any]
_LEGEND = (
    "Perplexity: lower is better. Accuracy, in percent: higher is better. Figures of different protocols or "
    "sources do not rank."
)


def models_of(figures: Sequence[Entry]) -> dict[str, dict[str, Any]]:
    """By the hub id of each model: its short name, the number of its figures, and their papers."""
    found: dict[str, dict[str, Any]] = {}
    for model in models():
        own = [figure["source"]["paper"] for figure in figures if figure["model"] == model]
        if own:
            found[model] = {"name": name_of(model), "figures": len(own), "papers": [*dict.fromkeys(own)]}
    return found


def print_models(console: Screen, found: Mapping[str, Entry]) -> None:
    """Print which models have published figures."""
    rows = [(entry["name"], str(entry["figures"]), ", ".join(entry["papers"])) for entry in found.values()]
    console.table("models with published figures", rows, ("", "figures", "papers"))


def print_figures(console: Screen, figures: Sequence[Entry]) -> None:
    """Print the figures of one model: a table for each source, text and protocol."""
    console.say(f"published figures of {figures[0]['model']}", "bold")
    for (metric, on, paper, *_), rows in _blocks(figures).items():
        first = rows[0]
        source, told = first["source"], protocol_words(Protocol(**first["protocol"]))
        mean = f"{metric}, mean of" if len(on) > 1 else f"{metric} on"
        places = {_amount(entry): entry["source"]["where"] for entry in rows}
        place = f" ({source['where']})" if len(set(places.values())) == 1 else ""
        console.verbatim()
        console.say(f"{paper}{place}: {mean} {', '.join(on)}", "bold")
        if told:
            console.say(told)
        console.verbatim(source["url"])
        console.say(f"read in {SEEN_IN[source['via']]} on {source['seen']}")
        if not place:
            console.say(", ".join(f"{amount}: {where}" for amount, where in places.items()))
        heads, cells = _by_amount(rows)
        console.table("", cells, ("", *heads, ""))
    console.verbatim()
    console.say(_LEGEND)


def print_beside(console: Screen, rows: Sequence[Entry]) -> None:
    """Print published figures beside ours, as `side_by_side` returns them; nothing without any."""
    if not rows:
        return
    console.verbatim()
    cells = [
        (
            f"{row['method']} {row['amount']} ({row['paper']})",
            row["figure"],
            f"{row['published']:,.2f}",
            _ours(row["ours"]),
            " ".join(protocols_of(row["ours"])),
        )
        for row in rows
    ]
    models = ", ".join(dict.fromkeys(row["model"] for row in rows))
    console.table(f"Published figures of {models}", cells, ("", "figure", "published", "ours", ""))


def _ours(ours: Sequence[Entry]) -> str:
    """Our figures of every run."""
    known = [f"{own['value']:,.2f} {own['run']}" for own in ours if own["value"] is not None]
    return ", ".join(known) or "not measured"


def _blocks(figures: Sequence[Entry]) -> dict[tuple[Any, ...], list[Entry]]:
    """The figures by what a table of them has in common: metric, text or tasks, source and protocol."""
    found: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in sorted(figures, key=lambda e: e["metric"] != "perplexity"):
        source = entry["source"]
        protocol = Protocol(**entry["protocol"])
        key = (entry["metric"], tuple(entry["on"]), source["paper"], source["url"], source["via"], protocol)
        found.setdefault(key, []).append(entry)
    return found


def _by_amount(rows: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """The heads and the cells of a table with a row for the dense model and for every method."""
    amounts = [*dict.fromkeys(_amount(entry) for entry in rows)]
    dense = {_amount(entry): entry["dense"] for entry in rows if entry["dense"] is not None}
    values: dict[str, dict[str, float]] = {"dense": dense} if dense else {}
    for entry in rows:
        values.setdefault(entry["method"], {})[_amount(entry)] = entry["value"]
    return amounts, [[name, *(_number(row.get(a)) for a in amounts), ""] for name, row in values.items()]


def _amount(entry: Entry) -> str:
    return amount_of(entry["pattern"], entry["sparsity"])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"
