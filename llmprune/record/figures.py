"""Puts the figures of a record into words, the same for the terminal, the report and the model card."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llmprune.common.messages import size_text
from llmprune.recipe.types import method_name
from llmprune.record.history import with_training

Record = dict[str, Any]


class ScoreRow(NamedTuple):
    """A row of the table of scores. `error` is the standard error of the pruned model's score.

    After a recovery, `pruned` is the trained model, `start` the one it was trained from, against which
    `change` is, and `gap` the share of the difference between dense and start that was closed.
    """

    name: str
    dense: str
    pruned: str
    error: str
    change: str
    note: str
    start: str = ""
    gap: str = ""


def skips(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe, as a record has it, leaves matrices dense that it could prune."""
    rules = recipe.get("rules", [])
    return any(isinstance(rule, Mapping) and rule.get("skip") for rule in rules)


def score_rows(record: Mapping[str, Any]) -> list[ScoreRow]:
    """A row for every score of a record."""
    evaluation = record["evaluation"]
    rows = [_perplexity_row(name, entry) for name, entry in evaluation["perplexity"].items()]
    return rows + [
        _task_row(f"{task} {metric}", entry, metrics["protocol"])
        for task, metrics in evaluation["tasks"].items()
        for metric, entry in metrics.items()
        if metric != "protocol"
    ]


def _perplexity_row(name: str, entry: Mapping[str, Any]) -> ScoreRow:
    protocol, before = entry["protocol"], entry[_before(entry)]
    dense, start, pruned = (_score(entry.get(key), 2) for key in ("dense", "start", "pruned"))
    return ScoreRow(
        name=f"perplexity {name}",
        dense=dense,
        pruned=pruned,
        error="",
        change="not comparable" if before is None else _signed(entry["pruned"] / before - 1, ",.1%", 3),
        note=f"{protocol['windows']} windows of {protocol['window']} tokens, lower is better",
        start=start if "start" in entry else "",
        gap=_gap(entry, False),
    )


def _task_row(name: str, entry: Mapping[str, Any], protocol: Mapping[str, Any]) -> ScoreRow:
    documents, metric = protocol["documents"], name.rpartition(" ")[2]
    dense, start, pruned = (_score(entry.get(key), 3) for key in ("dense", "start", "pruned"))
    return ScoreRow(
        name=name,
        dense=dense,
        pruned=pruned,
        error=f"± {entry['stderr']:.3f}" if entry["stderr"] is not None else "",
        change=_task_change(entry, documents),
        note=f"{documents} documents{direction(protocol, metric)}",
        start=start if "start" in entry else "",
        gap=_gap(entry, higher_is_better(protocol, metric), documents),
    )


def last_model(record: Mapping[str, Any], begun: bool) -> str:
    """What the model of a record is called beside others; `begun`: beside that which was trained, too."""
    return "recovered" if begun else "trained" if "recovery" in record else "pruned"


def from_dense(rows: Sequence[ScoreRow]) -> bool:
    """Whether the model that was trained was the dense one, by the scores."""
    return all(row.start == row.dense for row in rows)


def score_table(record: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The table of scores for the pages, and of a recovery also for the screen: its head and its rows."""
    rows = score_rows(record)
    if "recovery" not in record:
        return _HEAD, [(s.name, s.dense, with_error(s), s.change, s.note) for s in rows]
    if from_dense(rows):
        return _FROM_DENSE, [(s.name, s.dense, with_error(s), s.change, s.note) for s in rows]
    return _RECOVERED, [_recovered(row) for row in rows]


def _recovered(row: ScoreRow) -> tuple[str, ...]:
    """The cells of a row; what is said of a change stands in the note, for want of room."""
    change, _, remark = row.change.partition(", ")
    note = f"{row.note}; a change {remark}" if remark else row.note
    return row.name, row.dense, row.start, with_error(row), change, row.gap, note


_HEAD = ("", "dense", "pruned", "change", "")
_FROM_DENSE = ("", "dense", "trained", "change", "")
_RECOVERED = ("", "dense", "start", "recovered", "change", "gap closed", "")


def with_error(row: ScoreRow) -> str:
    """The pruned score with its standard error, where it has one."""
    return f"{row.pruned} {row.error}".rstrip()


def direction(protocol: Mapping[str, Any], metric: str) -> str:
    """Whether higher or lower scores of a metric are better, in words; empty where the task does not say."""
    better = higher_is_better(protocol, metric)
    return "" if better is None else ", higher is better" if better else ", lower is better"


def higher_is_better(protocol: Mapping[str, Any], metric: str) -> bool | None:
    """Whether higher scores of a metric are better; None where the task does not say.

    Records of early versions do not say it for any metric: they hold accuracies only, so higher is better.
    """
    found: bool | None = protocol.get("higher_is_better", {metric: True}).get(metric)
    return found


def _score(value: float | None, digits: int) -> str:
    return "none" if value is None else f"{value:.{digits}f}"


def _signed(value: float, form: str, digits: int) -> str:
    return format(round(value, digits) + 0.0, f"+{form}")  # + 0.0 makes -0.0 zero


def _before(entry: Mapping[str, Any]) -> str:
    """The key of the score with which that of the result is compared."""
    return "start" if "start" in entry else "dense"


def _task_change(entry: Mapping[str, Any], documents: int | None) -> str:
    before, after = entry[_before(entry)], entry["pruned"]
    if before is None or after is None:
        return "not comparable"
    delta = after - before
    unsure = entry["stderr"] is not None and 0 < abs(delta) <= 2 * _error(entry, before, documents)
    return _signed(delta, ".3f", 3) + (", within its error" if unsure else "")


def _error(entry: Mapping[str, Any], before: float, documents: int | None) -> float:
    """The standard error of a score, at least the binomial one of the mean of it and the one before.

    lm-eval gives an error of 0 where all documents have the same score, also for 0 right of 4.
    """
    mean = (before + entry["pruned"]) / 2
    share = math.sqrt(mean * (1 - mean) / documents) if documents and 0 <= mean <= 1 else 0.0
    return max(float(entry["stderr"]), share)


def _gap(entry: Mapping[str, Any], higher: bool | None, documents: int | None = None) -> str:
    """The share of the difference between dense and start that the training has closed.

    Empty where one of them is not known, or which is better; `none` where the start is not worse than the
    dense model, `unsure` where it is worse by no more than two standard errors.
    """
    dense, start, after = (entry.get(key) for key in ("dense", "start", "pruned"))
    if dense is None or start is None or after is None or higher is None:
        return ""
    lost = dense - start if higher else start - dense
    if lost <= 0:
        return "none"
    if entry.get("stderr") is not None and lost <= 2 * _error({**entry, "pruned": start}, dense, documents):
        return "unsure"
    return f"{round((start - after) / (start - dense), 2) + 0.0:.0%}"


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
    base = f"{steps}, {recipe['pattern']}{shared}{permuted} (recipe {recipe['name']})"
    return with_training(base, record) if "recovery" in record else base
