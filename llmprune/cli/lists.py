"""The lists that `llmprune recipes`, `methods` and `models` print: what there is, its cost and its effect.

The figures were measured once and ship with the package (`eval/results/costs.yaml`); of recoveries there are
none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from llmprune import registry
from llmprune.common.shipped import read_yaml, shipped, shipped_names
from llmprune.hub.aliases import ALIASES
from llmprune.recipe.recovery import DEFAULT, FOLDER
from llmprune.recipe.summary import summary as summary_of
from llmprune.terminal.console import Screen

Entry = dict[str, Any]
_HEAD = ("time", "memory", "50 %", "70 %", "")
_TITLES = {
    "pruners": "pruners (alone)",
    "refiners": "refiners (after wanda)",
    "updates": "updates (after wanda)",
    "allocators": "allocators (with wanda)",
    "recovery.schedules": "schedules of recover (when masks move, and how sparse they are)",
    "recovery.rules": "rules of recover (which weights a mask keeps)",
    "recovery.trainables": "trainables of recover (what is trained of a matrix)",
    "recovery.objectives": "objectives of recover (what training makes smaller)",
}


def costs() -> dict[str, dict[str, Entry]]:
    """The measured figures, by kind (`recipes`, `pruners`, ...) and name.

    `time` is relative to a run of Wanda, `memory` in GB, `perplexity` by sparsity.
    """
    return read_yaml(shipped("eval", "results", "costs.yaml"))


def recipes() -> dict[str, Entry]:
    """Each shipped recipe: of pruning its summary and figures, of recovery its summary and parts."""
    known = costs()["recipes"]
    found: dict[str, Entry] = {}
    for name in shipped_names("recipes"):
        summary = read_yaml(shipped("recipes", f"{name}.yaml"))["description"]
        found[name] = {"kind": "pruning", "summary": summary, **_figures(known.get(name, {}))}
    for name in shipped_names(*FOLDER):
        values = read_yaml(shipped(*FOLDER, f"{name}.yaml"))
        parts = summary_of(values)._asdict()
        found[name] = {"kind": "recovery", "summary": values["description"], **parts}
    return found


def methods() -> dict[str, dict[str, Entry]]:
    """Summary and options with their defaults of each algorithm, by kind; figures of those of pruning."""
    known = costs()
    found = {
        room: {
            name: {**registry.describe(room, name), **_figures(known.get(room, {}).get(name, {}))}
            for name in registry.names(room)
        }
        for room in registry.ROOMS
    }
    return found | {
        room: {name: registry.describe(room, name) for name in registry.names(room)}
        for room in registry.RECOVERY_ROOMS
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
    """Print two tables: of pruning, lowest perplexity at 70 % first, and of recovery, the default first."""
    pruning = {name: entry for name, entry in found.items() if entry["kind"] == "pruning"}
    names = sorted(pruning, key=lambda name: (found[name]["perplexity"] or {}).get("0.7", float("inf")))
    rows = [(name, *_cells(found[name]), found[name]["summary"]) for name in names]
    console.table("recipes", rows, ("", *_HEAD))
    console.verbatim()
    console.say(legend())
    console.verbatim()
    keys = ("masks", "trainable", "objective", "summary")
    rest = sorted((name for name in found if name not in pruning), key=lambda name: name != DEFAULT)
    rows = [(name, *(found[name][key] for key in keys)) for name in rest]
    console.table("recipes of recover", rows, ("", "masks", "trained", "loss", ""))


def print_models(console: Screen, found: Mapping[str, Entry]) -> None:
    """Print the names of models as a table."""
    keys = ("repository", "model_class", "note")
    rows = [(name, *(entry[key] or "" for key in keys)) for name, entry in found.items()]
    console.table("models", rows, ("", "hub id", "class", ""))


def print_methods(console: Screen, found: Mapping[str, Mapping[str, Entry]]) -> None:
    """Print a table for each kind of algorithm; the legend stands below those with figures."""
    for room, entries in found.items():
        measured = room in registry.ROOMS
        rows = []
        for name, entry in entries.items():
            options = ", ".join(f"{k}={v}" for k, v in entry["options"].items())
            summary = entry["summary"] + (f" ({options})" if options else "")
            rows.append((name, *(_cells(entry) if measured else ()), summary))
        console.table(_TITLES[room], rows, ("", *_HEAD) if measured else ())
        console.verbatim()
        if room == registry.ROOMS[-1]:
            console.say(legend())
            console.verbatim()


def _cells(entry: Entry) -> tuple[str, str, str, str]:
    perplexity = entry["perplexity"] or {}
    scores = (f"{perplexity[amount]:.2f}" if amount in perplexity else "" for amount in ("0.5", "0.7"))
    time, memory = (str(entry[key]) if entry[key] is not None else "" for key in ("time", "memory_gb"))
    return (time, f"{memory} GB" if memory else "", *scores)  # type: ignore[return-value]


def legend() -> str:
    """What the figures mean; printed below the tables."""
    return str(costs()["about"]["legend"])
