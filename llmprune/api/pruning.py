"""The Python API; every command is a thin call of it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune.api.arguments import AnyPath, checked
from llmprune.api.reporting import telling
from llmprune.api.result import DryRun, Result
from llmprune.checkpoint.replacement import MODEL, Inputs, check_output, input_files
from llmprune.common.messages import shown
from llmprune.evaluation.scores import EvaluationSpec, evaluation_spec
from llmprune.machine import processes
from llmprune.model.opening import Model, open_model
from llmprune.planning import choice
from llmprune.planning.plan import check_offload
from llmprune.recipe import loading as recipes
from llmprune.recipe.types import Recipe
from llmprune.run.preparation import Options, Request, Source, planned
from llmprune.run.production import Production
from llmprune.run.reporter import RunReporter
from llmprune.text import mixture
from llmprune.text.sources import file_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@checked()
def prune(
    model: AnyPath | PreTrainedModel,
    *,
    recipe: AnyPath | Mapping[str, Any] | Recipe | None = None,
    sparsity: float | None = None,
    pattern: str | None = None,
    pruner: Any = None,
    refiner: Any = None,
    update: Any = None,
    allocator: Any = None,
    calibration: Source | AnyPath | Mapping[str, float] | None = None,
    samples: int | None = None,
    seqlen: int | None = None,
    seed: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    output: AnyPath | None = None,
    overwrite: bool = False,
    resume: bool = False,
    restart: bool = False,
    offload: str = "auto",
    settings: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    time_limit: float | None = None,
    dry_run: bool = False,
    evaluation: EvaluationSpec | None = None,
    reporter: RunReporter | None = None,
    progress: bool | None = None,
) -> Any:
    """Prune a model and save it; with `evaluation`, score it dense first and pruned afterwards.

    Args:
        model: `demo`, an alias, a hub id, a folder, or a transformers model in memory.
        recipe: a recipe's name, a YAML file, or a mapping of recipe fields; None for `best` where its memory and time fit, else
            `dsnot`. The other options override its fields (`settings`: any, by dotted key).
        sparsity: share of weights removed, in [0, 1). pattern: `unstructured` or `N:M` (which implies its sparsity).
        pruner, refiner, update, allocator: a name, or a mapping `{"name": ..., option: value}`.
        calibration: any SOURCE, a mapping of sources to weights, an iterable of strings, or int64 tokens [N, T].
        samples, seqlen: rows and tokens per row.
        output: the folder to write; by default named after model, recipe and sparsity in the current directory.
        overwrite: replace the output of llmprune that is there, once the new one is complete; nothing else is replaced.
        resume: go on where an earlier run into this folder stopped. restart: throw away what it left.
        offload: where block inputs are kept: `ram`, `disk` (a file beside the output), or `auto` (RAM while the plan fits).
        time_limit: minutes the best recipe may take by estimate to be chosen; None for `LLMPRUNE_TIME_LIMIT`, else 60.
        dry_run: only plan.
        progress: draw plan and progress; None: in a notebook. reporter: told instead.

    Returns:
        `Result` (or `DryRun`).

    Raises:
        ValueError: bad input, in one line, before any long work.
    """
    source: Any = mixture.as_text(calibration) if isinstance(calibration, Mapping) else calibration
    check_offload(offload)
    overrides = _overrides(
        source,
        settings,
        **{
            "pattern": pattern,
            "sparsity": sparsity,
            "pruner": pruner,
            "refiner": refiner,
            "update": update,
            "allocator": allocator,
            "calibration.samples": samples,
            "calibration.sequence_length": seqlen,
            "seed": seed,
        },
    )
    limit = _time_limit(time_limit)
    named: Any = choice.LIGHT if recipe is None else recipe
    chosen = recipes.load(named, overrides)  # checked before any long work
    team = processes.current()

    def reopen(what: Any) -> Model:
        known = None if what is model else opened.tokenizer
        return open_model(
            what,
            tokenizer=known or tokenizer,
            revision=revision if what is model else None,
            device=str(device),
            dtype=str(dtype),
            trust_remote_code=trust_remote_code,
        )

    with telling(reporter, progress, team) as told:
        opened = team.in_turn(lambda: reopen(model))
        if recipe is None:
            chosen = team.on_first(lambda: choice.choose(overrides, opened, source, limit, team.size))
            named = chosen.name
        target = (
            Path(output).expanduser()
            if output is not None
            else default_output(opened, chosen, recipes.load(named))
        )
        remarks = choice.inherited(overrides, chosen) if recipe is None else ()
        # A limit the user knows of: given, or the one under which the best recipe was chosen.
        known = (
            limit * 60 if time_limit is not None or (recipe is None and chosen.name == choice.BEST) else None
        )
        inputs = _inputs(opened, recipe, chosen, evaluation)
        options = Options(
            target, inputs, overwrite, resume, restart, offload, trust_remote_code, known or None, remarks
        )
        request = Request(chosen, source, evaluation)
        if dry_run:
            check_output(target, overwrite or resume, inputs)
            work, _ = planned(opened, request, options, team, told)
            return DryRun(work.plan, work.recipe, target)
        production = Production(opened, options, team, told)
        try:
            record = production.make(request, reopen)
        except BaseException as error:
            production.close(error)
            raise
        production.close(None)
        return Result(target, record)


def _inputs(model: Model, recipe: Any, chosen: Recipe, evaluation: EvaluationSpec | None) -> Inputs:
    """The files and folders that a run reads: its output may not take their place."""
    named: list[tuple[str, object]] = [(MODEL, model.folder)]
    if model.folder is not None:  # its files may be links to where they really are
        named += [(MODEL, path.resolve()) for path in sorted(model.folder.iterdir()) if path.is_symlink()]
    if isinstance(recipe, (str, os.PathLike)) and os.fspath(recipe).endswith((".yaml", ".yml")):
        named.append(("the recipe", recipe))
    parts = mixture.plain_sources(chosen.calibration.source)
    named += [("the calibration file", file_path(part)) for part in parts if mixture.is_file(part)]
    return input_files([*named, *(evaluation.inputs if evaluation else ())])


def _overrides(calibration: Any, settings: Mapping[str, Any] | None, **named: Any) -> dict[str, Any]:
    """The fields of the recipe that were given, by dotted key."""
    named["calibration.source"] = calibration if isinstance(calibration, (str, type(None))) else "in-memory"
    return {**{k: v for k, v in named.items() if v is not None}, **(settings or {})}


def _time_limit(given: float | None) -> float:
    text = os.environ.get("LLMPRUNE_TIME_LIMIT") if given is None else None
    try:
        limit = float(text) if text is not None else choice.TIME_LIMIT if given is None else float(given)
    except (TypeError, ValueError):
        limit = -1.0
    if isinstance(given, bool) or not limit >= 0:
        raise ValueError(
            f"the time limit must be a number of minutes from 0, got {shown(text if given is None else given)}"
        )
    return limit


def default_output(model: Model, recipe: Recipe, own: Recipe) -> Path:
    """A folder named after model, recipe (and what was exchanged in it: `own` is the recipe's file) and sparsity."""
    amount = recipe.pattern.replace(":", "to") if ":" in recipe.pattern else f"{recipe.sparsity:g}"
    exchanged = [recipe.pruner.name] if recipe.pruner.name != own.pruner.name else []
    if (recipe.refiner and recipe.refiner.name) != (own.refiner and own.refiner.name):
        exchanged.append(recipe.refiner.name if recipe.refiner else "unrefined")
    if (updates := [u.name for u in recipe.update]) != [u.name for u in own.update]:
        exchanged += updates or ["unchanged"]
    return Path("-".join([model.label.rpartition("/")[2], recipe.name, *exchanged, amount]))


@checked()
def run_model(
    model: AnyPath | PreTrainedModel,
    *,
    perplexity: AnyPath | Sequence[AnyPath] = (),
    tasks: str | Sequence[str] = (),
    suite: AnyPath | None = None,
    eval_seqlen: int | None = None,
    include_tasks: AnyPath | None = None,
    task_data: AnyPath | None = None,
    limit: int | None = None,
    **options: Any,
) -> Any:
    """`prune` with evaluation, dense and pruned: the main job. Without texts, tasks or suite, the model's default suite.

    Args:
        perplexity: a text's name or file, or several. tasks: names, in a list or separated by commas.
    """
    given: tuple[Any, ...] = (perplexity, tasks, suite, eval_seqlen, include_tasks, task_data, limit)
    spec = evaluation_spec(*given, trust_remote_code=options.get("trust_remote_code", False))
    return prune(model, evaluation=spec, **options)
