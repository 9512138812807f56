"""The Python function `recover`: train a pruned model, or prune one while it is trained."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llmprune import calibration as calibrations
from llmprune.api import arguments
from llmprune.api.arguments import AnyPath, checked
from llmprune.api.recovery_start import aim_of, base_of, check_pruned, chosen_lesson, masking_of
from llmprune.api.reporting import remark_to, reporting
from llmprune.api.result import RecoveryDryRun, Result
from llmprune.calibration.overlap import check_apart
from llmprune.calibration.packing import Shortage
from llmprune.calibration.rows import check_length
from llmprune.checkpoint.replacement import MODEL, check_output, check_ways, input_files
from llmprune.checkpoint.stored_masks import holds_masks
from llmprune.common.messages import duration, shown
from llmprune.contracts import CalibrationSet
from llmprune.machine import processes
from llmprune.model.opening import Model, OpenOptions, open_model
from llmprune.planning.training import TrainingPlan
from llmprune.recipe import recovery as recipes
from llmprune.recipe.recovery import RecoveryRecipe
from llmprune.run.lesson import Asked, Lesson, held_count
from llmprune.run.preparation import Options, Source
from llmprune.run.recovery import Recovery, steps_of
from llmprune.run.reporter import RunReporter
from llmprune.text.files import file_path
from llmprune.text.mixture import is_file, plain_sources
from llmprune.text.tokenisation import default_length


@checked()
def recover(
    path: AnyPath,
    *,
    text: Source | AnyPath,
    tokens: int,
    output: AnyPath,
    recipe: AnyPath | Mapping[str, Any] | None = None,
    teacher: AnyPath | None = None,
    masks: AnyPath | None = None,
    sparsity: float | None = None,
    pattern: str | None = None,
    epochs: int = 1,
    seqlen: int | None = None,
    seed: int | None = None,
    settings: Mapping[str, Any] | None = None,
    perplexity: AnyPath | Sequence[AnyPath] = (),
    tasks: str | Sequence[str] = (),
    suite: AnyPath | None = None,
    eval_seqlen: int | None = None,
    include_tasks: AnyPath | None = None,
    task_data: AnyPath | None = None,
    limit: int | None = None,
    score: bool = True,
    samples_text: int | None = None,
    format: str = "dense",
    time_limit: float | None = None,
    dry_run: bool = False,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    overwrite: bool = False,
    resume: bool = False,
    restart: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    blocks: str | None = None,
    reporter: RunReporter | None = None,
    progress: bool | None = None,
) -> Any:
    """Train a pruned model with its sparsity kept or evolved, or prune a dense one while it is trained.

    The result is the step with the lowest loss on held-out text whose masks have exactly the sparsity that
    was asked for; the start itself where no step was better.

    Args:
        path: `demo`, an alias, a hub id or a folder: pruned (dense or packed), or dense where the recipe
            prunes as it trains.
        text: what to train on: a source as for calibration, or an iterable of strings or tokens int64 [N, T].
        tokens: to train on, all epochs together.
        output: the folder to write.
        recipe: a recipe of recovery by name, a YAML file, or a mapping of its fields; None for recover-best.
        teacher: the dense model, by name or folder; None for the one that the record names, where one is
            needed.
        masks: keep masks of a pruned model that come in a file of their own.
        sparsity: of a dense start, the share of weights that are pruned in the end; of a pruned one, where
            it shall be higher.
        pattern: likewise, `unstructured` or `N:M`.
        epochs: how often the text is read.
        seqlen: tokens per sequence; by default 2048, or the model's limit if that is shorter.
        seed: of everything random; 0 unless the recipe says otherwise.
        settings: any fields of the recipe by dotted key, such as `{"rate.rate": 1e-4}`.
        perplexity: texts to score, as for `run_model`. tasks, suite, eval_seqlen, include_tasks, task_data,
            limit: likewise.
        score: whether the dense model, the start and the result are scored.
        samples_text: how many texts the dense model (where it is at hand), the start and the result write
            for the report, as for `run_model`.
        format: of the weights in that folder: `dense` or `packed`.
        time_limit: minutes that training may take, by estimate: without `recipe` one is taken that fits; a
            recipe that was named runs all the same, after a note. None for no limit.
        dry_run: plan the recovery, and write nothing.
        device: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:N` or a torch.device.
        dtype: of forward and backward passes: `auto`, `float32`, `bfloat16` or a torch.dtype; what is trained
            is held in float32.
        overwrite: replace an output of llmprune in that folder, once the new one is complete.
        resume: continue where an earlier recovery into this folder stopped.
        restart: throw away what an unfinished one left in this folder.
        revision: branch, tag or commit of a model of the hub; None for its default branch.
        trust_remote_code: run Python code of the checkpoint or of task files.
        blocks: the list of the model's blocks by name; None as for `evaluate`.
        reporter: an object with `plan`, `stage`, `step` and `note` that is told the progress.
        progress: draw the progress on stderr or in the notebook's cell; None: only in a notebook.

    Returns:
        A `Result` with `output` and `record`, whose entry `recovery` holds recipe, text, curve and best step;
        with `dry_run` a `RecoveryDryRun` with `plan`, `recipe` and `output`.

    Raises:
        ValueError: bad input, before any long work; one line says what was received and what to do.
    """
    named: Any = recipes.DEFAULT if recipe is None else recipe
    overrides = dict(settings or {}) | ({} if seed is None else {"seed": seed})
    chosen = recipes.load(named, overrides)
    minutes = arguments.minutes(time_limit, math.inf)
    _check_numbers(text, tokens, (epochs, seqlen), format)
    texts = arguments.texts(samples_text)
    scoring: dict[str, Any] = {
        "perplexity": perplexity,
        "tasks": tasks,
        "suite": suite,
        "eval_seqlen": eval_seqlen,
        "include_tasks": include_tasks,
        "task_data": task_data,
        "limit": limit,
    }
    asked = next((name for name, value in scoring.items() if value), None)
    if not score and asked:
        raise ValueError(f"{asked} is for scoring, and nothing is to be scored; leave out one of the two")
    spec = arguments.evaluation(**scoring, trust_remote_code=trust_remote_code)
    team = processes.current()

    def opened_at(what: Any, revision: str | None = None) -> Model:
        how = OpenOptions(
            revision=revision,
            device=str(device),
            dtype=str(dtype),
            trust_remote_code=trust_remote_code,
            blocks=blocks,
        )
        return open_model(what, how)

    with reporting(reporter, progress, team) as report:
        model = team.in_turn(lambda: opened_at(path, revision))
        masking = masking_of(model, masks)
        aim = aim_of(chosen, masking, sparsity, pattern, path)
        if masks is not None and masking is not None:
            team.on_first(lambda: check_pruned(model, masking, masks))
        rows = team.on_first(lambda: training_rows(model, chosen, text, tokens, (epochs, seqlen)))
        prepared = team.in_turn(lambda: spec.prepare(model)) if score else None
        if prepared is not None:
            check_apart(rows.tokens, prepared.rows)

        def lesson_of(wanted: RecoveryRecipe) -> Lesson:
            base = team.in_turn(lambda: base_of(model, wanted, masking, teacher, opened_at))
            asked = Asked(tokens, epochs)
            return Lesson(model, wanted, rows, asked, team, masking, aim, base, teacher is not None)

        if recipe is None:
            lesson = chosen_lesson(lesson_of, overrides, steps_of, minutes)
        else:
            lesson = lesson_of(chosen)
            _note_time(lesson.plan(steps_of(lesson)), minutes, report)
        _note_teacher(lesson.base, report)
        target = Path(output).expanduser()
        options = Options(
            output=target,
            inputs=input_files([(MODEL, model.folder), *files_read(text, masks, teacher), *spec.inputs]),
            overwrite=overwrite,
            resume=resume,
            restart=restart,
            packed=format == "packed",
            samples=texts,
            trust_remote_code=trust_remote_code,
        )
        if dry_run:
            check_ways(resume, restart)
            check_output(target, overwrite or resume, options.inputs)
            return RecoveryDryRun(lesson.plan(steps_of(lesson)), lesson.recipe, target)
        recovery = Recovery(lesson, options, report)
        try:
            record = recovery.recover(prepared, opened_at)
        except BaseException as error:
            recovery.close(error)
            raise
        recovery.close(None)
        return Result(target, record)


def _check_numbers(text: Any, tokens: Any, reading: tuple[int, Any], format: str) -> None:
    epochs, seqlen = reading
    if seqlen is not None and (type(seqlen) is not int or seqlen < 2):
        raise ValueError(f"seqlen must be a whole number from 2, got {shown(seqlen)}")
    if text is None:
        raise ValueError("text must be a SOURCE, an iterable of strings or int64 tokens [N, T], got None")
    if tokens is None or tokens < 1:
        raise ValueError(f"tokens must be a whole number from 1, got {tokens}")
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    arguments.check_format(format)


def _note_teacher(base: Model | None, report: RunReporter) -> None:
    """Say that a teacher is pruned itself."""
    if base is not None and base.folder is not None and holds_masks(base.folder):
        remark_to(report, f"the teacher {base.label} is pruned itself; the dense model teaches more")


def _note_time(plan: TrainingPlan, limit: float, report: RunReporter) -> None:
    """Say that a recipe that was named will take longer than the limit."""
    if plan.seconds > 60 * limit:
        report.note(
            f"training will take about {duration(plan.seconds)}, more than --time-limit {limit:g}; fewer "
            "--tokens take less, and without --recipe one that fits is taken"
        )


def is_ready(text: Any) -> bool:
    """Whether a text is sequences of tokens already, which are used as they are."""
    return isinstance(text, torch.Tensor) or (
        isinstance(text, (str, os.PathLike)) and os.fspath(text).endswith(".safetensors")
    )


def training_rows(
    model: Model, recipe: RecoveryRecipe, text: Any, tokens: int, reading: tuple[int, int | None]
) -> CalibrationSet:
    """The sequences to train on, and those held out beside them.

    Args:
        model: with tokenizer.
        recipe: says how much is held out, and the seed.
        text: a source, strings or tokens.
        tokens: to train on.
        reading: how often the text is read, and the tokens per sequence (None for the usual number).

    Raises:
        ValueError: text that is too short, or sequences of another length.
    """
    epochs, length = reading
    ready = is_ready(text)
    length = length or default_length(model.limit)
    if not ready:
        check_length(length, model.limit)
    if isinstance(text, str) and "self" in plain_sources(text):
        raise ValueError(
            f"text {shown(text)} asks for text sampled from the model, with which only calibration is done; "
            "name another source, such as a file"
        )
    samples = math.ceil(tokens / (length * epochs))
    if samples < 2 and not ready:
        raise ValueError(
            f"tokens must fill two sequences of {length} in each epoch ({epochs}), which are "
            f"{length * epochs + 1} at least, got {tokens}; give more, or a smaller --seqlen"
        )
    held = max(1, round(samples * recipe.held_out / (1 - recipe.held_out)))
    request = calibrations.CalibrationRequest(
        samples=None if ready else samples + held,
        length=None if ready else length,
        limit=model.limit,
        vocabulary=model.skeleton.vocabulary,
        seed=recipe.seed,
    )
    try:
        rows = calibrations.build(text, model.tokenizer, request)
    except ValueError as error:
        if not isinstance(error.__cause__, Shortage):
            raise
        name = shown(text) if isinstance(text, (str, os.PathLike)) else "in memory"
        raise ValueError(
            f"the text {name} holds {error.__cause__.tokens:,} tokens, and {(samples + held) * length:,} are "
            f"needed for tokens {tokens:,} in epochs {epochs} and what is held out; give more text, fewer "
            "--tokens or more --epochs"
        ) from None
    if ready:
        _check_ready(rows.tokens, recipe.held_out, tokens, reading)
    return rows


def _check_ready(rows: torch.Tensor, held_out: float, tokens: int, reading: tuple[int, int | None]) -> None:
    """Raise `ValueError` where sequences that are used as they are have another length, or are too few."""
    (count, own), (epochs, length) = rows.shape, reading
    if length not in (None, own):
        raise ValueError(f"the text is sequences of {own} tokens, got seqlen {length}; leave it out")
    if count < 2:
        raise ValueError(f"the text has {count} sequence, and one is held out; give more")
    left = count - held_count(count, own, held_out)
    if left * own * epochs < tokens:
        raise ValueError(
            f"{left} sequences of {own} tokens, in epochs {epochs}, are {left * own * epochs:,} tokens, got "
            f"tokens {tokens:,}; give fewer tokens, or epochs {math.ceil(tokens / (left * own))}"
        )


def files_read(text: Any, masks: Any = None, teacher: Any = None) -> list[tuple[str, object]]:
    """The files and folders that are read beside the model."""
    parts = plain_sources(os.fspath(text)) if isinstance(text, (str, os.PathLike)) else []
    files = [("the text", file_path(part)) for part in parts if is_file(part)]
    return [*files, ("the masks", masks), ("the teacher", teacher)]
