"""The record of a recovery: that of the start it trained, with what the training was and what came of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llmprune.checkpoint.journal import Identity, difference
from llmprune.contracts import CalibrationSet
from llmprune.evaluation.scores import Scores
from llmprune.model.opening import Model
from llmprune.recipe.recovery import RecoveryRecipe
from llmprune.recipe.types import AlgorithmSpec, CalibrationSpec, Recipe
from llmprune.record import record as records
from llmprune.record.figures import Record
from llmprune.record.history import trainings

# What the training decides is compared; what only came of it is not.
_OUTCOME = ("curve", "rates", "rate", "best_step", "held_out", "seconds", "blocks", "earlier")
_NO_CALIBRATION = CalibrationSpec(source="none", samples=0, sequence_length=0)


def opening(
    model: Model,
    known: Record | None,
    recipe: RecoveryRecipe,
    rows: CalibrationSet,
    processes: int,
    digest: str,
) -> Record:
    """What the record says before the training.

    Args:
        model: the start.
        known: the record of the run that made it; None where it has none.
        recipe: how it is trained.
        rows: the text.
        processes: how many share the work.
        digest: the fingerprint of a dense start; empty for a pruned one, whose dense model is not known.
    """
    known = known if known is not None and "recipe" in known else None
    plain = Recipe(
        name=recipe.name,
        description=recipe.description,
        sparsity=0.0,
        pruner=AlgorithmSpec(name=recipe.name),
        calibration=_NO_CALIBRATION,
    )
    empty = CalibrationSet(rows.tokens[:0, :0], "none", 0, "")
    fresh = records.opening(model, plain, empty, digest, processes)
    kept = ("schema", "model", "recipe", "masks", "calibration", "allocation")
    start = {key: known[key] for key in kept if key in known} if known else fresh
    earlier = trainings(known) if known and "recovery" in known else []
    return {
        **start,
        "environment": fresh["environment"],
        "rows": {row["name"]: row for row in (known or {}).get("matrices", [])},
        "recovery": {
            "recipe": recipe.as_dict(),
            "text": {
                "source": rows.source,
                "sequences": rows.tokens.shape[0],
                "sequence_length": rows.tokens.shape[1],
                "seed": rows.seed,
                "digest": rows.digest,
                **rows.details,
            },
            **({"earlier": [_without_curve(each) for each in earlier]} if earlier else {}),
        },
    }


def _without_curve(recovery: Record) -> Record:
    """An earlier recovery, as the record of a later one keeps it."""
    return {key: value for key, value in recovery.items() if key not in ("curve", "earlier")}


def identity(record: Record) -> Identity:
    """What decides the bytes of a recovery's output: only one with the same identity may be resumed."""
    environment, recovery = record["environment"], record["recovery"]
    decided = {key: value for key, value in recovery.items() if key not in _OUTCOME}
    recipe = {k: v for k, v in decided["recipe"].items() if k not in ("chosen", "description")}
    return {
        "model": decided["start"]["digest"],
        "recovery": {**decided, "recipe": recipe},
        "versions": {name: environment["versions"][name] for name in ("llmprune", "torch", "transformers")},
        "dtype": environment["dtype"],
        "device": environment["device"].partition(",")[0],
        **({"format": record["format"]} if "format" in record else {}),
    }


def difference_of(record: Record, before: Record) -> str | None:
    """What differs between a finished recovery and this one; None where nothing does."""
    try:
        return difference(identity(record), identity(before))
    except (LookupError, TypeError, AttributeError):
        return "it is no recovery"


def outcome(trained: Mapping[str, Any]) -> Record:
    """What came of the training, for the entry `recovery`."""
    rates = {"rates": trained["rates"]} if trained["rates"] else {}
    return {
        **rates,
        **({"rate": trained["rate"]} if trained["rate"] is not None else {}),
        "best_step": trained["best_step"],
        "held_out": {"start": _rounded(trained["start"]), "best": _rounded(trained["best"])},
        "seconds": trained["seconds"],
        "curve": trained["curve"],
    }


def outcome_of_blocks(rows: list[Record]) -> Record:
    """What came of training block by block: the held-out errors of the blocks, from their rows."""
    by_block: dict[str, Record] = {}
    for row in rows:
        held = row.get("training", {}).get("held_out")
        if held:
            by_block.setdefault(json.dumps(held), held)
    return {"blocks": list(by_block.values())}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def add_scores(record: Record, dense: Scores | Record | None, start: Scores, result: Scores) -> Record:
    """The record with the scores of the dense model, the start and the result.

    Where the dense model is not at hand, `dense` are the scores in the start's own record; they are taken
    where they are of the same protocol, and are None otherwise.
    """
    measured = dense if isinstance(dense, Scores) else start
    record = records.add_scores(record, measured, result)
    known: Record = {} if isinstance(dense, Scores) else dense or {}
    evaluation = record["evaluation"]
    for name, entry in evaluation["perplexity"].items():
        entry["start"] = start.perplexity[name]["value"]
        if not isinstance(dense, Scores):
            entry["dense"] = _known(known.get("perplexity", {}).get(name), entry["protocol"], "dense")
    for name, metrics in evaluation["tasks"].items():
        old = known.get("tasks", {}).get(name, {})
        same = old.get("protocol") == metrics["protocol"]
        for metric, entry in metrics.items():
            if metric != "protocol":
                entry["start"] = start.tasks.get(name, {}).get(metric, {}).get("value")
                if not isinstance(dense, Scores):
                    entry["dense"] = old.get(metric, {}).get("dense") if same else None
    return record if dense is start else _with_seconds(record, dense, start)


def _with_seconds(record: Record, dense: Scores | Record | None, start: Scores) -> Record:
    """The record with the seconds of scoring the start, where that is not the dense model."""
    seconds = dict(record["totals"]["seconds"])
    if isinstance(dense, Scores):
        seconds["total"] = round(seconds["total"] + start.seconds, 3)
    else:
        del seconds["evaluate dense"]  # the start was counted as such
    seconds["evaluate start"] = round(start.seconds, 3)
    return record | {"totals": record["totals"] | {"seconds": seconds}}


def _known(entry: Any, protocol: Record, key: str) -> float | None:
    """A score of another record, if it was measured in the same way."""
    if not isinstance(entry, dict) or entry.get("protocol") != protocol:
        return None
    value = entry.get(key)
    return float(value) if isinstance(value, (int, float)) else None
