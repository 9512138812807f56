"""What there is, what it costs and what it gives: the recipes and methods that ship, with figures measured once (`eval/results`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmprune import registry
from llmprune.common.shipped import read_yaml, shipped, shipped_names
from llmprune.terminal.console import Screen

Entry = dict[str, Any]
_HEAD = ("time", "memory", "50 %", "70 %", "")
_TITLES = {
    "pruners": "pruners (alone)",
    "refiners": "refiners (after wanda)",
    "updates": "updates (after wanda)",
    "allocators": "allocators (with wanda)",
}


def costs() -> dict[str, dict[str, Entry]]:
    """Figures by room (`recipes` too) and name: `time` (Wanda's run is 1), `memory` in GB, `perplexity` by sparsity."""
    return read_yaml(shipped("eval", "results", "costs.yaml"))


def recipes() -> dict[str, Entry]:
    """The shipped recipes: summary and figures."""
    known = costs()["recipes"]
    return {
        name: {
            "summary": read_yaml(shipped("recipes", f"{name}.yaml"))["description"],
            **_figures(known.get(name, {})),
        }
        for name in shipped_names("recipes")
    }


def methods() -> dict[str, dict[str, Entry]]:
    """The algorithms of every room: summary, options with their defaults, and figures."""
    known = costs()
    return {
        room: {
            name: {**registry.describe(room, name), **_figures(known.get(room, {}).get(name, {}))}
            for name in registry.names(room)
        }
        for room in registry.ROOMS
    }


def _figures(entry: Mapping[str, Any]) -> Entry:
    """The same keys for all; null where nothing was measured."""
    perplexity = entry.get("perplexity", {})
    return {
        "time": entry.get("time"),
        "memory_gb": entry.get("memory"),
        "perplexity": {f"{amount:g}": value for amount, value in perplexity.items()} or None,
    }


def print_recipes(console: Screen, found: Mapping[str, Entry]) -> None:
    """The recipes as a table, the best at 70 % first."""
    names = sorted(found, key=lambda name: (found[name]["perplexity"] or {}).get("0.7", float("inf")))
    console.table(
        "recipes", [(name, *_cells(found[name]), found[name]["summary"]) for name in names], ("", *_HEAD)
    )
    console.verbatim()
    console.say(legend())


def print_methods(console: Screen, found: Mapping[str, Mapping[str, Entry]]) -> None:
    """Each room as a table of its own."""
    for room, entries in found.items():
        rows = []
        for name, entry in entries.items():
            options = ", ".join(f"{k}={v}" for k, v in entry["options"].items())
            rows.append((name, *_cells(entry), entry["summary"] + (f" ({options})" if options else "")))
        console.table(_TITLES[room], rows, ("", *_HEAD))
        console.verbatim()
    console.say(legend())


def _cells(entry: Entry) -> tuple[str, str, str, str]:
    perplexity = entry["perplexity"] or {}
    scores = (f"{perplexity[amount]:.2f}" if amount in perplexity else "" for amount in ("0.5", "0.7"))
    time, memory = (str(entry[key]) if entry[key] is not None else "" for key in ("time", "memory_gb"))
    return (time, f"{memory} GB" if memory else "", *scores)  # type: ignore[return-value]


def legend() -> str:
    """What the figures are."""
    return str(costs()["about"]["legend"])
