"""Pruning and recovery as one job."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llmprune import patterns
from llmprune.api import arguments
from llmprune.api.recovering import files_read, is_ready, recover, training_rows
from llmprune.api.reporting import reporting
from llmprune.api.result import DryRun
from llmprune.calibration.overlap import check_apart
from llmprune.checkpoint.contents import INDEX, RECORD
from llmprune.checkpoint.replacement import MODEL, Inputs, check_output, check_ways, input_files
from llmprune.checkpoint.writer import CheckpointWriter
from llmprune.contracts import Pattern
from llmprune.machine import processes
from llmprune.model.opening import OpenOptions, open_model
from llmprune.planning import choice
from llmprune.planning.plan import Plan
from llmprune.recipe import loading as pruning_recipes
from llmprune.recipe import recovery as recipes
from llmprune.run.lesson import Asked, Lesson
from llmprune.run.recovery import steps_of


class Training(NamedTuple):
    """What a recovery as a part of a run is asked for.

    Attributes:
        recipe: how to train.
        text: on what.
        tokens: how many of it, all epochs together.
        epochs: how often it is read.
        samples_text: how many texts the models write for the report.
    """

    recipe: Any
    text: Any
    tokens: int | None
    epochs: int
    samples_text: int | None


# Options of pruning that a recovery has too, with the same meaning.
_SHARED = (
    "seqlen",
    "format",
    "device",
    "dtype",
    "overwrite",
    "resume",
    "restart",
    "trust_remote_code",
    "blocks",
    "reporter",
    "progress",
)


def prune_and_recover(
    model: Any, training: Training, scoring: Mapping[str, Any], options: Mapping[str, Any]
) -> Any:
    """Prune into the folder OUTPUT-pruned, train from there into OUTPUT.

    Args:
        model: by name or folder; the teacher, where the recipe needs one.
        training: recipe, text, tokens and epochs.
        scoring: what is scored, by the parameters of `recover`.
        options: of `prune`.

    Raises:
        ValueError: bad input, before any long work.
    """
    from llmprune.api.pruning import prune

    if not isinstance(model, (str, os.PathLike)):
        raise ValueError("--recover needs a model by name or folder, for its teacher; save this one first")
    if training.text is None or training.tokens is None:
        missing = "text" if training.text is None else "tokens"
        raise ValueError(f"--recover trains on text: give --text SOURCE and --tokens N, got no {missing}")
    if options.get("output") is None:
        raise ValueError("--recover needs the name of its folder: give --output DIR")
    if options.get("values") not in (None, "same"):
        raise ValueError(
            "--recover trains values as they are; round them afterwards: llmprune convert --values"
        )
    output = Path(os.fspath(options["output"])).expanduser()
    start = output.with_name(f"{output.name}-pruned")
    planned = _planned(model, training, scoring, options)
    way = processes.current().on_first(lambda: _way(start, options))
    pruned = prune(model, **{**options, **way, "output": start, "format": "dense"})
    if isinstance(pruned, DryRun):
        with reporting(options.get("reporter"), options.get("progress"), processes.current()) as report:
            for line in planned(pruned.plan):
                report.note(line)
        return pruned
    shared = {key: options[key] for key in _SHARED if options.get(key) is not None}
    if is_ready(training.text):  # then `seqlen` is of the calibration text alone
        shared.pop("seqlen", None)
    return recover(
        start,
        recipe=training.recipe,
        text=training.text,
        tokens=training.tokens,
        epochs=training.epochs,
        teacher=model,
        output=output,
        samples_text=training.samples_text,
        **scoring,
        **shared,
    )


def _way(start: Path, options: Mapping[str, Any]) -> dict[str, bool]:
    """How to begin with the folder of the pruned model: one that is whole is gone on from.

    Raises:
        ValueError: it is there, and what shall become of it was not said.
    """
    if not ((start / INDEX).is_file() and (start / RECORD).is_file()):
        return {}
    if options.get("restart"):  # which throws away what is unfinished
        return {"restart": False, "resume": True}
    if not (options.get("resume") or options.get("overwrite")):
        raise ValueError(
            f"{start} holds the pruned model of an earlier run; go on from it with --resume, replace it with "
            "--overwrite, or choose another --output"
        )
    return {}


def _planned(
    model: Any, training: Training, scoring: Mapping[str, Any], options: Mapping[str, Any]
) -> Callable[[Plan], list[str]]:
    """What tells the plan of the training, in words, given that of the pruning before it.

    Raises:
        ValueError: the training or its scores cannot be, which is known before anything is pruned.
    """
    recipe = recipes.load(training.recipe)
    opening = OpenOptions(
        revision=options.get("revision"),
        device=str(options.get("device", "auto")),
        dtype=str(options.get("dtype", "auto")),
        trust_remote_code=options.get("trust_remote_code", False),
        blocks=options.get("blocks"),
    )
    length = None if is_ready(training.text) else options.get("seqlen")
    team = processes.current()
    opened = team.in_turn(lambda: open_model(model, opening))
    tokens, reading = training.tokens or 0, (training.epochs, length)
    rows = team.on_first(lambda: training_rows(opened, recipe, training.text, tokens, reading))
    spec = arguments.evaluation(**scoring, trust_remote_code=opening.trust_remote_code)
    check_apart(rows.tokens, team.in_turn(lambda: spec.prepare(opened)).rows)
    inputs = input_files([(MODEL, opened.folder), *files_read(training.text), *spec.inputs])
    team.on_first(lambda: _check_output(inputs, options))
    asked = Asked(tokens, training.epochs)
    lesson = Lesson(opened, recipe, rows, asked, team, None, None, opened if recipe.teaches else None, False)
    steps, coming = steps_of(lesson), _coming(options)
    if coming is not None:
        lesson.plan(steps, coming).check()

    def lines(pruning: Plan) -> list[str]:
        made = next(iter(pruning.matrices.values())).pattern, pruning.sparsity
        return [f"then training by recipe {recipe.name}", *lesson.plan(steps, made).lines()]

    return lines


def _check_output(inputs: Inputs, options: Mapping[str, Any]) -> None:
    """Raise `ValueError` where the training could not write its folder, which is left as it is."""
    output = Path(os.fspath(options["output"])).expanduser()
    overwrite, resume, restart = (bool(options.get(key)) for key in ("overwrite", "resume", "restart"))
    if options.get("dry_run"):
        check_ways(resume, restart)
        check_output(output, overwrite or resume, inputs)
    else:
        ways = {"overwrite": overwrite, "resume": resume, "restart": restart}
        CheckpointWriter(output, **ways, inputs=inputs).close()


def _coming(options: Mapping[str, Any]) -> tuple[Pattern, float] | None:
    """The pattern and sparsity that pruning will give every matrix; None where matrices differ.

    Args:
        options: of `prune`.
    """
    given = {key: options[key] for key in ("pattern", "sparsity") if options.get(key) is not None}
    named = options.get("recipe") or choice.LIGHT
    pruning = pruning_recipes.load(named, given | dict(options.get("settings") or {}))
    if pruning.rules or options.get("masks") is not None:
        return None
    return patterns.parse(pruning.pattern), pruning.sparsity
