"""Puts a recovery into words: what was trained on what, and what came of it.

The words are the same for the terminal, the report and the model card.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
    recipe = recovery["recipe"]
    if "rate" in recovery:
        tried = ", ".join(
            f"{one:g}: {held:.4f}" if held >= 0 else f"{one:g}: diverged" for one, held in recovery["rates"]
        )
        return f"{recovery['rate']:g}, by the held-out loss of a short trial of each ({tried})"
    if recipe["rates"]:
        return f"for each block one of {', '.join(f'{one:g}' for one in recipe['rates'])}, by a short trial"
    relative = " of the matrix's own size" if recipe["rate"].get("relative") else ""
    return f"{recipe['rate']['rate']:g}{relative}, the recipe's"


def _best(recovery: Mapping[str, Any]) -> str:
    if "held_out" not in recovery:
        return _best_of_blocks(recovery.get("blocks", []))
    held, steps = recovery["held_out"], recovery["steps"]
    start, best, step = held["start"], held["best"], recovery["best_step"]
    if start is None or best is None:
        return ""
    begun = f"{start:.4f} at the start"
    if step == 0:
        return f"{begun}, lower at none of {steps:,} steps"
    perplexities = f"perplexity {_perplexity(start)}, {_perplexity(best)}"
    return f"{begun}, {best:.4f} at step {step:,} of {steps:,}, which was saved ({perplexities})"


def _perplexity(loss: float) -> str:
    """The perplexity at a loss; of a start that is no model any more it is beyond all numbers."""
    return f"{math.exp(loss):,.2f}" if loss < 50 else "beyond 1e21"


def _best_of_blocks(blocks: Sequence[Mapping[str, Any]]) -> str:
    """The held-out errors of training block by block."""
    if not blocks:
        return ""
    start, best = (sum(block[key] for block in blocks) / len(blocks) for key in ("start", "best"))
    lower = sum(block["best"] < block["start"] for block in blocks)
    return (
        f"{start:.4g} at the start, {best:.4g} trained, in the mean of {len(blocks)} blocks; lower in {lower}"
    )


def _flips(recovery: Mapping[str, Any]) -> str:
    curve = recovery.get("curve", [])
    if not recovery["recipe"].get("rule") or not curve:
        return ""
    total = sum(row["flipped"] for row in curve)
    last = max((row["step"] for row in curve if row["flipped"]), default=0)
    after = f", none after step {last:,}" if last else ""
    return f"{total:.2%} of all mask entries, every flip counted{after}"


def advice(record: Mapping[str, Any]) -> str:
    """What the best step says about the next training; empty where it says nothing."""
    recovery = record["recovery"]
    if "best_step" not in recovery:
        return ""
    if recovery["best_step"] == 0:
        rate = recovery.get("rate", recovery["recipe"]["rate"]["rate"])
        return (
            "No step was better than the start on held-out text, so the weights are the start's. "
            f"Try more --tokens, or a lower rate: --set rate.rate={rate / 3:.1g} --set rates=[]."
        )
    if recovery["best_step"] == recovery["steps"]:
        return "The last step was the best one: the loss was still falling, and more --tokens may lower it."
    return ""
