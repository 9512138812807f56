"""The section of the report on a training: its curves, what it was, and how to repeat it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmprune.pages.charts import Point, lines
from llmprune.pages.document import (
    Markup,
    Section,
    abreast,
    code,
    commands,
    folded,
    joined,
    listed,
    paragraph,
)
from llmprune.pages.tables import facts
from llmprune.recipe.summary import summary
from llmprune.record.card import as_yaml
from llmprune.record.recovered import advice, training_rows
from llmprune.record.repeating import repetition

Record = Mapping[str, Any]


def sections(record: Record) -> list[Section]:
    """The section on a recovery; none where there was none."""
    if "recovery" not in record:
        return []
    recovery, again, told = record["recovery"], repetition(record), advice(record)
    digests = (
        f"Digest of the tokens {recovery['text']['digest']}, of the start {recovery['start']['digest']}."
    )
    parts = [
        paragraph(told) if told else "",
        curves(recovery),
        facts(training_rows(record), "The training"),
        paragraph(digests, "soft"),
        folded("The recipe of the training with every default", code(as_yaml(recovery["recipe"]), "recipe")),
        paragraph("To train it again:"),
        code(commands(again.commands), "command") if again.commands else "",
        listed(again.needed),
    ]
    return [Section("Training", joined(part for part in parts if part))]


def curves(recovery: Record) -> Markup:
    """The course of a training by step or by block; empty where nothing is known of it."""
    if recovery.get("curve"):
        return abreast([_losses(recovery), *_masks(recovery)])
    if not recovery.get("blocks"):
        return Markup("")
    by = {
        name: [Point(number, block[key]) for number, block in enumerate(recovery["blocks"])]
        for name, key in (("start", "start"), ("trained", "best"))
    }
    return abreast([lines(by, ("block", "error"), "Held-out error of the outputs of each block", zero=True)])


def _losses(recovery: Record) -> Markup:
    """Loss on the batches and on held-out text, and the step that was saved."""
    curve, held, best_step = recovery["curve"], recovery["held_out"], recovery["best_step"]
    begun = [Point(0, held["start"])] if held["start"] is not None else []
    objective = summary(recovery["recipe"]).objective
    batches = "batches" if objective in ("next-token", "block") else f"batches ({objective})"
    series = {
        "held out": [*begun, *(Point(row["step"], row["held_out_loss"]) for row in curve)],
        batches: [Point(row["step"], row["loss"]) for row in curve],
    }
    if held["best"] is not None:
        series[f"saved, step {best_step}"] = [Point(best_step, held["best"])]
    return lines(series, ("step", "loss"), "Loss by step")


def _masks(recovery: Record) -> list[Markup]:
    """Of masks that move, their flips and the sparsity."""
    if not recovery["recipe"].get("rule"):
        return []
    curve = recovery["curve"]
    series = {
        "sparsity": [Point(row["step"], row["sparsity"]) for row in curve],
        "flipped since the point before": [Point(row["step"], row["flipped"]) for row in curve],
    }
    return [lines(series, ("step", "share"), "Masks by step, share of all entries", zero=True)]
