"""Puts a recovery into words: what was trained on what, and what came of it.

The words are the same for the terminal, the report and the model card.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llmprune.recipe.summary import summary
from llmprune.record.record import calibrated_on


def training_rows(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was trained, on what text and with whom, and what came of it."""
    recovery = record["recovery"]
    recipe, text = recovery["recipe"], recovery["text"]
    parts = summary(recipe)
    rows = [
        ("recovery", " ".join(f"{recipe['name']}. {recipe['description']}".split())),
        ("trained", f"{parts.trainable}; loss {parts.objective}; masks {parts.masks}"),
        ("from", recovery["start"]["source"]),
        ("teacher", recovery.get("teacher", {}).get("source", "")),
        ("text", f"{text['sequences']:,} x {text['sequence_length']:,} tokens of {calibrated_on(text)}"),
        ("tokens", f"{recovery['tokens']:,} in {_steps(recovery)}"),
        ("learning rate", _rates(recovery)),
        (_loss(recipe), _best(recovery)),
        ("mask flips", _flips(recovery)),
    ]
    return [(name, words) for name, words in rows if words]


def _steps(recovery: Mapping[str, Any]) -> str:
    batch, length = recovery["recipe"]["batch"], recovery["text"]["sequence_length"]
    return f"{recovery['steps']:,} steps of {batch} x {length}"


def _loss(recipe: Mapping[str, Any]) -> str:
    return "held-out loss" if recipe["scope"] == "model" else "held-out error"


def _rates(recovery: Mapping[str, Any]) -> str:
    rate = recovery["recipe"]["rate"]["rate"]
    if "rate" not in recovery:
        return f"{rate:g}, the recipe's"
    tried = ", ".join(
        f"{one:g}: {held:.4f}" if held >= 0 else f"{one:g}: diverged" for one, held in recovery["rates"]
    )
    return f"{recovery['rate']:g}, by the held-out loss of a short trial of each ({tried})"


def _best(recovery: Mapping[str, Any]) -> str:
    held, steps = recovery["held_out"], recovery["steps"]
    start, best, step = held["start"], held["best"], recovery["best_step"]
    if start is None or best is None:
        return ""
    begun = f"{start:.4f} at the start"
    if step == 0:
        return f"{begun}, lower at none of {steps:,} steps"
    words = f"{begun}, {best:.4f} at step {step:,} of {steps:,}, which was saved"
    if recovery["recipe"]["scope"] == "model":
        words += f" (perplexity {math.exp(start):,.2f}, {math.exp(best):,.2f})"
    return words


def _flips(recovery: Mapping[str, Any]) -> str:
    if not recovery["recipe"].get("rule"):
        return ""
    total = sum(row["flipped"] for row in recovery["curve"])
    last = max((row["step"] for row in recovery["curve"] if row["flipped"]), default=0)
    return f"{total:.2%} of all mask entries, every flip counted" + (
        f", none after step {last:,}" if last else ""
    )


def advice(record: Mapping[str, Any]) -> str:
    """What the best step says about the next training; empty where it says nothing."""
    recovery = record["recovery"]
    if recovery["best_step"] == 0:
        rate = recovery.get("rate", recovery["recipe"]["rate"]["rate"])
        return (
            "No step was better than the start on held-out text, so the weights are the start's. "
            f"Try more --tokens, or a lower rate: --set rate.rate={rate / 3:.1g} --set rates=[]."
        )
    if recovery["best_step"] == recovery["steps"]:
        return "The last step was the best one: the loss was still falling, and more --tokens may lower it."
    return ""
