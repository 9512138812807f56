"""The lists that `llmprune recipes`, `methods` and `models` print: what there is, its cost and its effect.

The figures were measured once and ship with the package (`eval/results/costs.yaml`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from llmprune import registry
from llmprune.common.shipped import read_yaml, shipped, shipped_names
from llmprune.hub.aliases import ALIASES
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
    """The measured figures, by kind (`recipes`, `pruners`, ...) and name.

    `time` is relative to a run of Wanda, `memory` in GB, `perplexity` by sparsity.
    """
    return read_yaml(shipped("eval", "results", "costs.yaml"))


def recipes() -> dict[str, Entry]:
    """Summary and figures of each shipped recipe."""
    known = costs()["recipes"]
    found = {}
    for name in shipped_names("recipes"):
        summary = read_yaml(shipped("recipes", f"{name}.yaml"))["description"]
        found[name] = {"summary": summary, **_figures(known.get(name, {}))}
    return found


def methods() -> dict[str, dict[str, Entry]]:
    """Summary, options with their defaults, and figures of each algorithm, by kind."""
    known = costs()
    return {
        room: {
            name: {**registry.describe(room, name), **_figures(known.get(room, {}).get(name, {}))}
            for name in registry.names(room)
        }
        for room in registry.ROOMS
    }


def models() -> dict[str, Entry]:
    """Hub id, class in transformers and note of each model name; the demo has no hub id."""
    demo = {"repository": None, "model_class": "LlamaForCausalLM", "note": "embedded, needs no network"}
    return {"demo": demo} | {name: dataclasses.asdict(alias) for name, alias in ALIASES.items()}


def _figures(entry: Mapping[str, Any]) -> Entry:
    """Figures with the same keys for all entries; None where nothing was measured."""
    perplexity = entry.get("perplexity", {})
    return {
        "time": entry.get("time"),
        "memory_gb": entry.get("memory"),
        "perplexity": {f"{amount:g}": value for amount, value in perplexity.items()} or None,
    }


def print_recipes(console: Screen, found: Mapping[str, Entry]) -> None:
    """Print the recipes as a table, the one with the lowest perplexity at 70 % sparsity first."""
    names = sorted(found, key=lambda name: (found[name]["perplexity"] or {}).get("0.7", float("inf")))
    rows = [(name, *_cells(found[name]), found[name]["summary"]) for name in names]
    console.table("recipes", rows, ("", *_HEAD))
    console.verbatim()
    console.say(legend())


def print_models(console: Screen, found: Mapping[str, Entry]) -> None:
    """Print the names of models as a table."""
    keys = ("repository", "model_class", "note")
    rows = [(name, *(entry[key] or "" for key in keys)) for name, entry in found.items()]
    console.table("models", rows, ("", "hub id", "class", ""))


def print_methods(console: Screen, found: Mapping[str, Mapping[str, Entry]]) -> None:
    """Print a table for each kind of algorithm."""
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
    """What the figures mean; printed below the tables."""
    return str(costs()["about"]["legend"])
