"""A run from its plan to the scored folder: locked, journalled, resumable, on one process or several."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from llmprune import calibration as calibrations
from llmprune.calibration.sampling import Sampler
from llmprune.checkpoint.journal import Identity, difference
from llmprune.checkpoint.reader import Overlay, fingerprint, read_record
from llmprune.checkpoint.replacement import Inputs
from llmprune.checkpoint.writer import CheckpointWriter, check_space
from llmprune.contracts import CalibrationSet
from llmprune.evaluation.scores import EvaluationSpec, Scores, score
from llmprune.machine import device as devices
from llmprune.machine.processes import Team
from llmprune.model.activations import in_memory, on_disk
from llmprune.model.opening import Model
from llmprune.planning.advice import on_texts
from llmprune.planning.estimate import with_times
from llmprune.planning.plan import Plan, make_plan, with_scoring
from llmprune.recipe.types import CalibrationSpec, Recipe
from llmprune.record import record as records
from llmprune.record import report
from llmprune.record.figures import Record
from llmprune.run import corridor as run
from llmprune.run.measures import measure
from llmprune.run.progress import Progress
from llmprune.run.reporter import RunReporter
from llmprune.run.trials import search
from llmprune.text.mixture import plain_sources

Source = str | Tensor | Iterable[str]
Measured = tuple[dict[int, float], dict[int, float]]  # of blocks, of trials


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
    trust_remote_code: bool = False
    time_limit: float | None = None  # seconds the run should not take, where the user knows of such a limit
    remarks: tuple[str, ...] = ()  # on how the recipe came about


def planned(
    model: Model,
    recipe: Recipe,
    calibration: Source | None,
    options: Options,
    team: Team,
    reporter: RunReporter,
    evaluation: EvaluationSpec | None = None,
    known: Callable[[Recipe, CalibrationSet], Measured | None] = lambda recipe, rows: None,
) -> tuple[Recipe, CalibrationSet, EvaluationSpec | None, Plan]:
    """The recipe with its calibration as it turned out, the calibration rows, what will be scored, prepared, and the plan.

    `known`: what the allocator has measured for this recipe and these rows before, if it has.
    """
    prepared = team.in_turn(lambda: evaluation.prepare(model)) if evaluation is not None else None
    rows = team.on_first(lambda: build_calibration(model, recipe, calibration, reporter))
    n, t = rows.tokens.shape
    if n < team.size:
        raise ValueError(f"{team.size} processes share {n} calibration samples; start at most {n}")
    sampled = {key: rows.details.get(key) for key in ("temperature", "top_p")}
    spec = CalibrationSpec(source=rows.source, samples=n, sequence_length=t, **sampled)
    resolved = dataclasses.replace(recipe, calibration=spec)
    started = time.monotonic()
    measures, losses = known(resolved, rows) or _measured(model, resolved, rows, options, team, reporter)
    seconds = time.monotonic() - started if measures or losses else 0.0
    available = team.on_first(devices.available_memory)
    plan = make_plan(
        resolved,
        model.skeleton,
        model.source,
        n,
        t,
        offload=options.offload,
        available=available,
        processes=team.size,
        measures=measures,
        losses=losses,
    )
    plan = dataclasses.replace(plan, seconds=seconds)
    if prepared is not None:
        texts = [(len(r), r.shape[1]) for r in prepared.rows.values()]
        plan = with_scoring(plan, model.skeleton, model.source, texts, bool(prepared.tasks))
    remarks = on_texts(
        model, calibration is None and recipe.calibration.source == "auto" and not model.remote, evaluation
    )
    plan = dataclasses.replace(plan, remarks=(*options.remarks, *remarks, *model.skeleton.remarks()))
    plan = team.on_first(lambda: with_times(plan, resolved, model, prepared, team.size))
    reporter.plan(model, resolved, plan, rows, options.output)
    return resolved, rows, prepared, plan


def _measured(
    model: Model, recipe: Recipe, rows: CalibrationSet, options: Options, team: Team, reporter: RunReporter
) -> Measured:
    """What the allocator asks for before it can decide: measures of the blocks, losses of its trials."""
    allocator, blocks = recipe.build_allocator(), len(model.skeleton.blocks)
    if allocator.needs:
        reporter.stage("measuring blocks", blocks)
    measures = measure(allocator, model.skeleton, model.source, rows.tokens, recipe.seed, team, reporter.step)
    if allocator.trials:
        reporter.stage("trying allocations", blocks * len(allocator.trials))
    around = options.output.resolve()
    folder = next(parent for parent in around.parents if parent.is_dir())
    return measures, search(
        recipe, measures, model, rows, folder, options.offload, team, reporter.step, reporter.note
    )


def build_calibration(
    model: Model, recipe: Recipe, given: Source | None, reporter: RunReporter
) -> CalibrationSet:
    """The calibration rows of a run: what was given, else the recipe's source (`auto`: c4 for hub models, else built-in text)."""
    spec = recipe.calibration
    source: Source = given if given is not None and not isinstance(given, str) else spec.source
    if isinstance(source, str) and source == "auto":
        source = "c4" if model.remote else "builtin"
    sampled = {
        key: float(value) for key in ("temperature", "top_p") if (value := getattr(spec, key)) is not None
    }
    if sampled and not (isinstance(source, str) and "self" in plain_sources(source)):
        known = repr(source) if isinstance(source, str) else "text or tokens in memory"
        key = next(iter(sampled))
        raise ValueError(
            f"calibration.{key} is of text sampled from the model, got source {known}; leave it out or use --calibration self"
        )
    vocabulary = model.skeleton.model.get_input_embeddings().weight.shape[0]
    request = calibrations.CalibrationRequest(
        samples=spec.samples,
        length=spec.sequence_length,
        limit=model.limit,
        vocabulary=vocabulary,
        seed=recipe.seed,
    )
    return calibrations.build(source, model.tokenizer, request, Sampler(model, reporter, **sampled))


class Production:
    """One run into one output folder. `writer` is rank 0's alone: the other processes write nothing."""

    def __init__(self, model: Model, options: Options, team: Team, reporter: RunReporter) -> None:
        self.model, self.options, self.team, self.reporter = model, options, team, reporter
        self.writer: CheckpointWriter | None = None
        self._fingerprint = ""
        self._left = "pruned and saved"  # how far the output is, once it is in place
        team.on_first(self._open)

    def _open(self) -> None:
        o = self.options
        self.writer = CheckpointWriter(
            o.output, overwrite=o.overwrite, resume=o.resume, restart=o.restart, inputs=o.inputs
        )

    def make(
        self,
        recipe: Recipe,
        calibration: Source | None,
        evaluation: EvaluationSpec | None,
        reopen: Callable[[Path], Model],
    ) -> Record:
        """Prune, save and, with `evaluation`, score dense and pruned; returns the record."""
        model, team, reporter = self.model, self.team, self.reporter
        recipe, rows, evaluation, plan = planned(
            model, recipe, calibration, self.options, team, reporter, evaluation, self._known
        )
        team.on_first(lambda: check_space(self.options.output, plan.disk))
        before = records.opening(model, recipe, rows, self._digest(), team.size) | records.allocation(
            recipe, plan.measures, plan.losses
        )
        record = team.on_first(lambda: self._made_before(before))
        if record is None:
            team.on_first(lambda: self._begin(before, plan))
            dense = self._dense(evaluation)
            record = self._prune(recipe, plan, rows, before)
        elif evaluation and not _scored(record, evaluation):
            dense = self._dense(evaluation)
        else:
            evaluation = None
        if evaluation is not None and dense is not None:
            self._left = "pruned and saved but not scored"
            pruned = score(reopen(self.options.output.resolve()), evaluation, "pruned", reporter, team)
            unscored, record = record, records.add_scores(record, dense, pruned)
            team.on_first(functools.partial(self._write_pages, record, unscored))
        self._left = "finished"
        team.on_first(self._complete)
        return record

    def _digest(self) -> str:
        """The fingerprint of the model's weights, read once."""
        if not self._fingerprint:
            self.reporter.stage("checking weights", 1)
            self._fingerprint = self.team.on_first(lambda: fingerprint(self.model.source))
            self.reporter.step()
        return self._fingerprint

    def _known(self, recipe: Recipe, rows: CalibrationSet) -> Measured | None:
        """What the allocator has measured for this very run before: to measure again takes long, and may differ in the last digit."""
        allocator = recipe.build_allocator()
        if not allocator.needs and not allocator.trials:
            return None
        now = records.identity(records.opening(self.model, recipe, rows, self._digest(), self.team.size))
        return self.team.on_first(lambda: self._measured_before(now))

    def _measured_before(self, now: Identity) -> Measured | None:
        assert self.writer is not None
        if self.writer.reopened:
            record = read_record(self.writer.output)
            return records.measured(record) if not _differs(record, now) else None
        journal = self.writer.journal
        if not journal.blocks:
            return None
        self.writer.check_identity(now)
        found = journal.find("measures") or [{}, {}]
        return {int(k): v for k, v in found[0].items()}, {int(k): v for k, v in found[1].items()}

    def _made_before(self, before: Record) -> Record | None:
        """The record of the finished run that `resume` found in the output folder."""
        assert self.writer is not None
        if not self.writer.reopened:
            return None
        record = read_record(self.writer.output)
        differs = _differs(record, records.identity(before))
        if not differs:
            self.reporter.note(f"{self.options.output} is pruned already")
            return record
        if not self.writer.overwrite:
            raise ValueError(
                f"output folder {self.options.output} holds another finished run: {differs}; choose another with --output or replace it "
                "with --overwrite"
            )
        return None

    def _begin(self, before: Record, plan: Plan) -> None:
        assert self.writer is not None
        skeleton = self.model.skeleton
        shapes = {skeleton.stored[f"{n}.weight"]: m.shape for n, m in plan.matrices.items()}
        files = self.model.files
        companions = files.companions(self.options.trust_remote_code) if files else None
        self.writer.begin(records.identity(before), len(skeleton.blocks) + 1, shapes, companions)
        if (plan.measures or plan.losses) and not self.writer.journal.find("measures"):
            self.writer.journal.add({"measures": [plan.measures, plan.losses]})

    def _dense(self, evaluation: EvaluationSpec | None) -> Scores | None:
        """The dense model's scores, from the journal where this run has measured them already."""
        if evaluation is None:
            return None
        key = evaluation.key(self.model.skeleton.dtype)
        known = self.team.tell(self.writer.journal.find("dense") if self.writer else None)
        if known and known["key"] == key:
            return Scores(known["perplexity"], known["tasks"], known["seconds"])
        scores = score(self.model, evaluation, "dense", self.reporter, self.team)
        if self.writer and self.writer.journal.identity is not None:
            self.writer.journal.add({"dense": {"key": key, **dataclasses.asdict(scores)}})
        return scores

    def _prune(self, recipe: Recipe, plan: Plan, rows: CalibrationSet, before: Record) -> Record:
        skeleton, writer, team = self.model.skeleton, self.writer, self.team
        done: list[Path] = team.tell(writer.finished if writer else [])
        clock = run.Clock(skeleton.device)
        if plan.seconds:
            clock.seconds["allocate"] = plan.seconds
        if writer and done:
            clock.seconds |= writer.journal.blocks[-1]["seconds"]
        devices.reset_peak_device_memory(skeleton.device)
        blocks = len(skeleton.blocks)
        self.reporter.stage("pruning blocks", blocks)
        if done:
            self.reporter.note(
                f"{len(done)} of {blocks} blocks are finished; their outputs are computed again, then the run goes on"
            )
        progress = Progress(self.reporter, blocks, len(done), self.options.time_limit, recipe.name)

        def block_done(
            number: int,
            tensors: Mapping[str, Tensor],
            masks: Mapping[str, Tensor],
            matrices: list[Record],
            seconds: Mapping[str, float],
        ) -> None:
            if writer:
                writer.block(number, tensors, masks, matrices, seconds)
            progress.block(number)

        folder = self.options.output.resolve().parent
        store = on_disk(writer.folder if writer else folder) if plan.offload == "disk" else in_memory
        with devices.PrivateMemory() as memory:
            if len(done) < blocks:
                source = Overlay(self.model.source, done)
                run.prune_blocks(
                    recipe,
                    plan,
                    skeleton,
                    source,
                    rows,
                    len(done),
                    team,
                    clock,
                    store,
                    self.reporter.note,
                    block_done,
                )
            return team.on_first(lambda: self._finish(before, clock, memory))

    def _finish(self, before: Record, clock: run.Clock, memory: devices.PrivateMemory) -> Record:
        writer, model = self.writer, self.model
        assert writer is not None
        writer.rest(model.source)
        if model.files:
            writer.copy_companions(model.files, self.options.trust_remote_code)
            for name in model.files.appeared():
                self.reporter.note(
                    f"{name} appeared in the model's folder during the run and is not taken along"
                )
        else:
            _save_companions(model, writer.folder)
        model.check()
        writer.index()
        clock.lap("write")
        record = records.complete(before, model, writer.rows, clock.seconds, memory.peak, writer)
        report.write(writer.folder, record, writer.output.name)
        writer.finish()
        return record

    def _write_pages(self, record: Record, before: Record) -> None:
        """Record, card and report anew, now with scores; a card that was edited by hand stays."""
        assert self.writer is not None
        folder = self.writer.output
        if not report.write(folder, record, folder.name, before):
            self.reporter.note(
                f"README.md in {self.options.output} was edited by hand and stays as it is; the scores are in report.html"
            )

    def _complete(self) -> None:
        assert self.writer is not None
        self.writer.complete()

    def close(self, error: BaseException | None) -> None:
        """Release the output; an error is told what is kept of the run (`kept`), and whether the run can go on (`resumable`)."""
        if self.writer is None:
            return
        moved, finished = self.writer.moved, self.writer.close()
        if error is None or not (moved or finished):
            return
        blocks = len(self.model.skeleton.blocks)
        kept = (
            f"{self.options.output} is {self._left}"
            if moved
            else f"{finished} of {blocks} blocks are finished and kept"
        )
        error.kept = kept  # type: ignore[attr-defined]
        error.resumable = not (moved and self._left == "finished")  # type: ignore[attr-defined]


def _differs(record: Record, now: Identity) -> str | None:
    """What differs between a finished run and this one, None when nothing does."""
    try:
        return difference(records.identity(record), now)
    except (LookupError, TypeError, AttributeError):
        return "its record is not of this program"


def _scored(record: Record, evaluation: EvaluationSpec) -> bool:
    have = record["evaluation"]
    return set(evaluation.rows) <= set(have["perplexity"]) and set(evaluation.tasks) <= set(have["tasks"])


def _save_companions(model: Model, folder: Path) -> None:
    model.instance.config.save_pretrained(folder)
    if getattr(model.instance, "generation_config", None) is not None:
        model.instance.generation_config.save_pretrained(folder)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)
