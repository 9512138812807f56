"""Puts the figures of a record into words, the same for the terminal, the report and the model card."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from llmprune.common.messages import size_text
from llmprune.recipe.types import method_name

Record = dict[str, Any]


def duration(seconds: float) -> str:
    """A time in words, such as "2 min 5 s"; at least a second."""
    seconds = max(1.0, seconds)
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class ScoreRow(NamedTuple):
    """A row of the table of scores. `error` is the standard error of the pruned model's score."""

    name: str
    dense: str
    pruned: str
    error: str
    change: str
    note: str


def score_rows(record: Mapping[str, Any]) -> list[ScoreRow]:
    """A row for every score of a record."""
    rows = []
    for name, entry in record["evaluation"]["perplexity"].items():
        protocol = entry["protocol"]
        note = f"{protocol['windows']} windows of {protocol['window']} tokens, lower is better"
        change = _signed(entry["pruned"] / entry["dense"] - 1, ",.1%", 3)
        dense, pruned = f"{entry['dense']:.2f}", f"{entry['pruned']:.2f}"
        rows.append(ScoreRow(f"perplexity {name}", dense, pruned, "", change, note))
    for task, metrics in record["evaluation"]["tasks"].items():
        documents = metrics["protocol"]["documents"]
        for metric, entry in metrics.items():
            if metric != "protocol":
                error = f"+- {entry['stderr']:.3f}" if entry["stderr"] is not None else ""
                note = f"{documents} documents{direction(metrics['protocol'], metric)}"
                change = _task_change(entry, documents)
                dense, pruned = (_score(entry[key]) for key in ("dense", "pruned"))
                rows.append(ScoreRow(f"{task} {metric}", dense, pruned, error, change, note))
    return rows


def direction(protocol: Mapping[str, Any], metric: str) -> str:
    """Whether higher or lower scores of a metric are better, in words; empty where the task does not say.

    Records of early versions do not say it for any metric: they hold accuracies only, so higher is better.
    """
    better = protocol.get("higher_is_better", {metric: True}).get(metric)
    return "" if better is None else ", higher is better" if better else ", lower is better"


def _score(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _signed(value: float, form: str, digits: int) -> str:
    return format(round(value, digits) + 0.0, f"+{form}")  # + 0.0 makes -0.0 zero


def _task_change(entry: Mapping[str, Any], documents: int | None) -> str:
    if entry["dense"] is None or entry["pruned"] is None:
        return "not comparable"
    delta = entry["pruned"] - entry["dense"]
    unsure = entry["stderr"] is not None and 0 < abs(delta) <= 2 * _error(entry, documents)
    return _signed(delta, ".3f", 3) + (", within its error" if unsure else "")


def _error(entry: Mapping[str, Any], documents: int | None) -> float:
    """The standard error of a score, at least the binomial one of the two scores' mean.

    lm-eval gives an error of 0 where all documents have the same score, also for 0 right of 4.
    """
    mean = (entry["dense"] + entry["pruned"]) / 2
    share = math.sqrt(mean * (1 - mean) / documents) if documents and 0 <= mean <= 1 else 0.0
    return max(float(entry["stderr"]), share)


def share_of_all(record: Mapping[str, Any]) -> str:
    """The share of zeros among all parameters; those outside the pruned matrices count as nonzero."""
    zeros, parameters = record["totals"]["zeros"], record["model"]["parameters"]
    return f"{zeros / parameters:.2%} of all {parameters:,} parameters"


def sparsity_reached(record: Mapping[str, Any]) -> str:
    """The share of zeros in the pruned matrices, and in the whole model."""
    totals = record["totals"]
    zeros = f"{totals['zeros']:,} of {totals['weights']:,} weights"
    return f"{totals['sparsity']:.4%} of the pruned matrices ({zeros}), {share_of_all(record)}"


def seconds_by_phase(record: Mapping[str, Any]) -> str:
    """The seconds of a run, and of those of its phases that took at least 0.05 s."""
    seconds = record["totals"]["seconds"]
    phases = {name: value for name, value in seconds.items() if name != "total" and value >= 0.05}
    times = ", ".join(f"{name} {value:.1f}" for name, value in phases.items())
    return f"{seconds['total']:.1f}" + (f" ({times})" if times else "")


def size_remark(record: Mapping[str, Any]) -> str:
    """What a user must know of the size and speed of what was written."""
    if record.get("format", {}).get("name") == "sparse-bitmask":
        return (
            "The weights are in the format sparse-bitmask of compressed-tensors: of every pruned matrix the "
            "nonzero values and a bit per weight are stored. compressed-tensors reads it up to version 0.14; "
            "llmprune convert makes it dense (--to dense)."
        )
    sizes = record["totals"]["bytes"]
    if "format" in record:
        return (
            f"The weights are packed: {_stored(record)}, "
            f"{_of(sizes['written'], sizes['dense'])} in all. transformers loads them where llmprune is "
            "installed and imported; without it, it stops. How fast they are depends on the machine: "
            "llmprune bench measures it."
        )
    dense = (
        "The weights are stored densely, zeros included: as they are, this model is neither smaller on disk "
        "nor faster than the original."
    )
    packed = sizes.get("packed")
    if packed is None:
        return f"{dense} llmprune convert makes it smaller (--to packed), llmprune bench measures how fast."
    if packed >= sizes["dense"]:
        return f"{dense} Packed it would not be smaller: too few weights are zero."
    return (
        f"{dense} Packed it takes {_of(packed, sizes['dense'])}: llmprune convert writes it so (--to "
        "packed), llmprune bench measures how fast it is then."
    )


def _stored(record: Mapping[str, Any]) -> str:
    """What a packed folder holds of its matrices."""
    values = record["format"].get("values", "same")
    rounded = "" if values == "same" else f", rounded to {values.removeprefix('int')} bits,"
    rows = record.get("matrices", [])
    if rounded and rows and all(row.get("target_sparsity") == 0 for row in rows):
        return f"of every matrix all values{rounded} are stored"
    return f"of every pruned matrix the kept values{rounded} and a bit per weight are stored"


def _of(packed: int, dense: int) -> str:
    return f"{size_text(packed)} instead of {size_text(dense)} ({packed / dense:.0%})"


def sizes_on_disk(record: Mapping[str, Any]) -> str:
    """The bytes of the weights: dense, as they were written, and packed."""
    sizes = record["totals"]["bytes"]
    dense, written = size_text(sizes["dense"]), size_text(sizes["written"])
    packed = f", {size_text(sizes['packed'])} if packed" if "packed" in sizes else ""
    return f"{dense} dense, {written} written" + ("" if "format" in record else packed)


def speed_measured(record: Mapping[str, Any]) -> str:
    """What the run has measured of the speed of its weights when they are packed; empty where it has not."""
    speed = record.get("speed", {})
    if "small" in speed:
        rows, columns = speed["small"]
        return (
            f"not measured: with matrices of at most {rows} x {columns} a call takes longer than its product"
        )
    if not speed.get("tokens"):
        return str(speed.get("kernels", ""))
    (rows, columns), (first, *others) = speed["shape"], speed["tokens"].items()
    times = f"{first[1]['faster_by']:.2f} x the speed of dense at {first[0]} token"
    times += "".join(f", {entry['faster_by']:.2f} x at {n}" for n, entry in others)
    return f"packed {times}: products of its largest matrices, {rows} x {columns}; {speed['kernels']}"


def masks_given(record: Mapping[str, Any]) -> str:
    """Where given masks came from, in words: the base model and the recipe, as far as known, and a digest."""
    masks = record["masks"]
    of = f"those of {masks['model']} (recipe {masks['recipe']}), " if "model" in masks else ""
    return f"{of}{masks['digest']}"


def method_of(record: Record) -> str:
    """The method in words: pruner, refiner, updates, pattern, recipe, and what differs from the defaults."""
    recipe = record["recipe"]
    specs = (recipe["pruner"], recipe["refiner"], *recipe.get("update", []))
    steps = " + ".join(method_name(spec["name"], spec) for spec in specs if spec)
    allocator = recipe.get("allocator", {"name": "uniform"})["name"]
    shared = f", sparsity shared out by {allocator}" if allocator != "uniform" else ""
    permuted = ", channels permuted" if recipe.get("permute") else ""
    return f"{steps}, {recipe['pattern']}{shared}{permuted} (recipe {recipe['name']})"
