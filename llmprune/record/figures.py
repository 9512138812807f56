"""Figures in words, the same on the terminal, in the report and in the model card."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

Record = dict[str, Any]


def duration(seconds: float) -> str:
    """Seconds for people, at least one."""
    seconds = max(1.0, seconds)
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


class ScoreRow(NamedTuple):
    """A score of the dense and of the pruned model, the standard error of the latter, the change, and how it was measured."""

    name: str
    dense: str
    pruned: str
    error: str
    change: str
    note: str


def score_rows(record: Mapping[str, Any]) -> list[ScoreRow]:
    """Every score of a record."""
    rows = []
    for name, entry in record["evaluation"]["perplexity"].items():
        protocol = entry["protocol"]
        note = f"{protocol['windows']} windows of {protocol['window']} tokens, lower is better"
        change = _signed(entry["pruned"] / entry["dense"] - 1, ",.1%", 3)
        rows.append(
            ScoreRow(
                f"perplexity {name}", f"{entry['dense']:.2f}", f"{entry['pruned']:.2f}", "", change, note
            )
        )
    for task, metrics in record["evaluation"]["tasks"].items():
        documents = metrics["protocol"]["documents"]
        for metric, entry in metrics.items():
            if metric != "protocol":
                error = f"+- {entry['stderr']:.3f}" if entry["stderr"] is not None else ""
                note = f"{documents} documents{direction(metrics['protocol'], metric)}"
                change = _task_change(entry, documents)
                dense, pruned = (
                    "none" if entry[k] is None else f"{entry[k]:.3f}" for k in ("dense", "pruned")
                )
                rows.append(ScoreRow(f"{task} {metric}", dense, pruned, error, change, note))
    return rows


def direction(protocol: Mapping[str, Any], metric: str) -> str:
    """Which scores of a metric are better, where the task says so; records without a word of it hold accuracies alone."""
    better = protocol.get("higher_is_better", {metric: True}).get(metric)
    return "" if better is None else ", higher is better" if better else ", lower is better"


def _signed(value: float, form: str, digits: int) -> str:
    return format(round(value, digits) + 0.0, f"+{form}")  # never "-0.0"


def _task_change(entry: Mapping[str, Any], documents: int | None) -> str:
    if entry["dense"] is None or entry["pruned"] is None:
        return "not comparable"
    delta = entry["pruned"] - entry["dense"]
    unsure = entry["stderr"] is not None and 0 < abs(delta) <= 2 * _error(entry, documents)
    return _signed(delta, ".3f", 3) + (", within its error" if unsure else "")


def _error(entry: Mapping[str, Any], documents: int | None) -> float:
    """The standard error of a score, not below that of a share of so many documents: none of 4 right is no certainty."""
    mean = (entry["dense"] + entry["pruned"]) / 2
    share = math.sqrt(mean * (1 - mean) / documents) if documents and 0 <= mean <= 1 else 0.0
    return max(float(entry["stderr"]), share)


def share_of_all(record: Mapping[str, Any]) -> str:
    """How many of all parameters are zero, those outside the pruned matrices counted as not."""
    zeros, parameters = record["totals"]["zeros"], record["model"]["parameters"]
    return f"{zeros / parameters:.2%} of all {parameters:,} parameters"


def sparsity_reached(record: Mapping[str, Any]) -> str:
    """The zeros of the pruned matrices, and what that is of the whole model."""
    totals = record["totals"]
    zeros = f"{totals['zeros']:,} of {totals['weights']:,} weights"
    return f"{totals['sparsity']:.4%} of the pruned matrices ({zeros}), {share_of_all(record)}"


def seconds_by_phase(record: Mapping[str, Any]) -> str:
    """The seconds of a run, and of its phases where they are worth a mention."""
    seconds = record["totals"]["seconds"]
    phases = ", ".join(
        f"{name} {value:.1f}" for name, value in seconds.items() if name != "total" and value >= 0.05
    )
    return f"{seconds['total']:.1f}" + (f" ({phases})" if phases else "")


HONEST = (
    "The weights are stored densely, zeros included: as they are, this model is neither smaller on disk nor faster than the original. "
    "Runtimes that use the zeros (2:4 kernels, sparse formats, compression) can make it so."
)


def method_of(record: Record) -> str:
    """The method in words: recipe, pruner, steps, pattern and what else is not as usual."""
    recipe = record["recipe"]
    steps = " + ".join(
        s["name"] for s in (recipe["pruner"], recipe["refiner"], *recipe.get("update", [])) if s
    )
    allocator = recipe.get("allocator", {"name": "uniform"})["name"]
    shared = f", sparsity shared out by {allocator}" if allocator != "uniform" else ""
    permuted = ", channels permuted" if recipe.get("permute") else ""
    return f"{steps}, {recipe['pattern']}{shared}{permuted} (recipe {recipe['name']})"
