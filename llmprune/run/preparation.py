"""What a run is asked for, and what is prepared before the work: calibration rows, texts to score, plan."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from llmprune import calibration as calibrations
from llmprune.calibration.sampling import Sampler
from llmprune.checkpoint.replacement import Inputs
from llmprune.contracts import CalibrationSet
from llmprune.evaluation.scores import EvaluationSpec
from llmprune.machine import device as devices
from llmprune.machine.processes import Team
from llmprune.model.opening import Model
from llmprune.planning.advice import on_texts
from llmprune.planning.disk import with_output
from llmprune.planning.estimate import with_times
from llmprune.planning.given import Given
from llmprune.planning.plan import Findings, Resources, make_plan, with_scoring
from llmprune.recipe.types import CalibrationSpec, Recipe
from llmprune.run.measures import measure
from llmprune.run.reporter import RunReporter
from llmprune.run.samples import NONE, Wish
from llmprune.run.shared import Run
from llmprune.run.sharing import Shared
from llmprune.run.trials import search
from llmprune.text.mixture import plain_sources

Source = str | Tensor | Iterable[str]
Known = Callable[[Run], Findings | None]  # what the allocator found out before, for the very same run


@dataclass(frozen=True)
class Request:
    """What a run is asked for.

    Attributes:
        recipe: how to prune.
        calibration: what to calibrate on; None for the recipe's own source.
        evaluation: what to score, dense and pruned; None for no scores.
        given: the masks to start from; None where the recipe's pruner makes them.
        rows: the calibration rows, where they were made before.
        shared: what the run shares with others of a sweep.
    """

    recipe: Recipe
    calibration: Source | None = None
    evaluation: EvaluationSpec | None = None
    given: Given | None = None
    rows: CalibrationSet | None = None
    shared: Shared | None = None


@dataclass(frozen=True)
class Options:
    """Where a run writes and how; nothing here changes a mask.

    `inputs`: the files and folders the run reads: the output may not take their place.
    """

    output: Path
    inputs: Inputs = ()
    overwrite: bool = False
    resume: bool = False
    restart: bool = False
    offload: str = "auto"
    packed: bool = False  # whether the weights are stored packed
    trust_remote_code: bool = False
    samples: Wish = NONE  # texts for the report
    time_limit: float | None = None  # seconds the run should not take, where the user knows of such a limit
    remarks: tuple[str, ...] = ()  # on how the recipe came about


def planned(
    model: Model,
    request: Request,
    options: Options,
    team: Team,
    reporter: RunReporter,
    known: Known = lambda run: None,
) -> tuple[Run, EvaluationSpec | None]:
    """A run with its plan, and what will be scored, prepared.

    The recipe of the run says how many calibration rows there are of how many tokens, and from which source.

    Args:
        known: what the allocator found out about this run before, if it did.
    """
    evaluation, recipe, given = request.evaluation, request.recipe, request.given
    prepared = team.in_turn(lambda: evaluation.prepare(model)) if evaluation is not None else None
    rows = team.on_first(
        lambda: request.rows or build_calibration(model, recipe, request.calibration, reporter)
    )
    samples, length = rows.tokens.shape
    if samples < team.size:
        raise ValueError(
            f"{team.size} processes share {samples} calibration samples; start at most {samples}"
        )
    recipe = calibrated(recipe, rows)
    resources = Resources(options.offload, team.on_first(devices.available_memory), team.size)
    plan = make_plan(recipe, model.skeleton, samples, length, resources)  # refuses what cannot be planned
    around = options.output.resolve()
    folder = next(parent for parent in around.parents if parent.is_dir())
    if given is not None:
        plan = dataclasses.replace(plan, matrices=given.matrices)
    masking = given.masking if given else None
    run = Run(recipe, plan, model, rows, team, reporter, folder, masking, request.shared)
    started = time.monotonic()
    findings = known(run) or _findings(run, resources)
    if any(findings):
        resources = dataclasses.replace(resources, available=team.on_first(devices.available_memory))
        plan = make_plan(recipe, model.skeleton, samples, length, resources, findings)
        plan = dataclasses.replace(plan, seconds=time.monotonic() - started)
    if prepared is not None:
        texts = [(len(windows), windows.shape[1]) for windows in prepared.rows.values()]
        plan = with_scoring(plan, model.skeleton, texts, bool(prepared.tasks))
    unnamed = request.calibration is None and request.recipe.calibration.source == "auto"
    remarks = on_texts(model, unnamed and not model.remote, evaluation)
    remarks += given.remarks if given else ()
    plan = with_output(plan, model, (recipe.bits or 16) if options.packed else None)
    if recipe.build_allocator().rows and not any(plan.measures.values()):
        name = recipe.allocator.name
        remarks += (f"no gradients for allocator {name}: every matrix gets the same sparsity",)
    remarks += plan.remarks
    plan = dataclasses.replace(plan, remarks=(*options.remarks, *remarks, *model.skeleton.remarks()))
    plan = team.on_first(lambda: with_times(plan, recipe, model, prepared, team.size))
    reporter.plan(model, recipe, plan, rows, options.output)
    return dataclasses.replace(run, plan=plan), prepared


def calibrated(recipe: Recipe, rows: CalibrationSet) -> Recipe:
    """The recipe with what its calibration rows really are: their source, how many of how many tokens."""
    samples, length = rows.tokens.shape
    sampled = {key: rows.details.get(key) for key in ("temperature", "top_p")}
    spec = CalibrationSpec(
        source=rows.source,
        samples=samples,
        sequence_length=length,
        chat_template=recipe.calibration.chat_template,
        **sampled,
    )
    return dataclasses.replace(recipe, calibration=spec)


def _findings(run: Run, resources: Resources) -> Findings:
    """What the allocator asks for before it can decide: measures of the blocks, losses of its trials."""
    allocator, blocks = run.recipe.build_allocator(), len(run.skeleton.blocks)
    if allocator.measures:
        run.reporter.stage("measuring blocks", blocks * (2 if allocator.rows else 1))
    measures = run.shared.measures(run.recipe, lambda: measure(run)) if run.shared else measure(run)
    if allocator.trials:
        run.reporter.stage("trying allocations", blocks * len(allocator.trials))
    return Findings(measures, search(run, measures, resources))


def build_calibration(
    model: Model, recipe: Recipe, given: Source | None, reporter: RunReporter
) -> CalibrationSet:
    """The calibration rows of a run: from what was given, else from the recipe's source.

    The source `auto` is c4 for a model of the hub, else the built-in text.
    """
    spec = recipe.calibration
    source: Source = given if given is not None and not isinstance(given, str) else spec.source
    if isinstance(source, str) and source == "auto":
        source = "c4" if model.remote else "builtin"
    given_values = {key: getattr(spec, key) for key in ("temperature", "top_p")}
    sampled = {key: float(value) for key, value in given_values.items() if value is not None}
    if sampled and not (isinstance(source, str) and "self" in plain_sources(source)):
        known = repr(source) if isinstance(source, str) else "text or tokens in memory"
        key = next(iter(sampled))
        raise ValueError(
            f"calibration.{key} is of text sampled from the model, got source {known}; "
            "leave it out or use --calibration self"
        )
    vocabulary = model.skeleton.model.get_input_embeddings().weight.shape[0]
    request = calibrations.CalibrationRequest(
        samples=spec.samples,
        length=spec.sequence_length,
        limit=model.limit,
        vocabulary=vocabulary,
        seed=recipe.seed,
        chat_template=spec.chat_template,
    )
    return calibrations.build(source, model.tokenizer, request, Sampler(model, reporter, **sampled))
