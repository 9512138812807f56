"""A run from its plan to the scored folder: locked, journalled, resumable, on one process or several."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Container
from pathlib import Path

from llmprune.checkpoint.journal import Identity, difference
from llmprune.checkpoint.overlay import Overlay
from llmprune.checkpoint.packing import Packing
from llmprune.checkpoint.placement import check_space
from llmprune.checkpoint.reader import fingerprint, read_record
from llmprune.checkpoint.shard import Shard
from llmprune.checkpoint.writer import CheckpointWriter
from llmprune.evaluation.scores import EvaluationSpec, Scores, score
from llmprune.machine import device as devices
from llmprune.machine.processes import Team
from llmprune.model.opening import Model
from llmprune.model.targets import all_targets, packed_layouts
from llmprune.planning.plan import Findings, Plan
from llmprune.recipe.types import Recipe
from llmprune.record import record as records
from llmprune.record import report
from llmprune.record.figures import Record
from llmprune.run import corridor, speed
from llmprune.run.block import Block
from llmprune.run.clock import Clock
from llmprune.run.preparation import Options, Request, planned
from llmprune.run.progress import Progress
from llmprune.run.reporter import RunReporter
from llmprune.run.samples import Writers, with_samples
from llmprune.run.shared import Run


class Production:
    """One run into one output folder. `writer` is rank 0's alone: the other processes write nothing."""

    def __init__(self, model: Model, options: Options, team: Team, reporter: RunReporter) -> None:
        self.model, self.options, self.team, self.reporter = model, options, team, reporter
        self.writer: CheckpointWriter | None = None
        self._packing: Packing | None = None  # None for a dense output
        self._fingerprint = ""
        self._left = "pruned and saved"  # how far the output is, once it is in place
        team.on_first(self._open)

    def _open(self) -> None:
        o = self.options
        self.writer = CheckpointWriter(
            o.output, overwrite=o.overwrite, resume=o.resume, restart=o.restart, inputs=o.inputs
        )

    def make(self, request: Request, reopen: Callable[[Path], Model]) -> Record:
        """Prune and save; with something to evaluate, score dense and pruned. Returns the record."""
        model, team, reporter = self.model, self.team, self.reporter
        self._packing = self._packer(request.recipe)
        work, evaluation = planned(model, request, self.options, team, reporter, self._known)
        team.on_first(lambda: self._check_space(work.plan.disk))
        before = self._opening(work) | records.allocation(work.recipe, work.plan.measures, work.plan.losses)
        record = team.on_first(lambda: self._made_before(before))
        if record is None:
            team.on_first(lambda: self._begin(before, work.plan.matrices))
            team.on_first(lambda: self._keep_findings(work.plan))
            dense = self._scores("dense", model, evaluation) if evaluation else None
            record = self._prune(work, before)
        elif evaluation and not scored(record, evaluation):
            dense = self._scores("dense", model, evaluation)
        else:
            evaluation = None
        if evaluation is not None and dense is not None:
            self._left = "pruned and saved but not scored"
            pruned = score(reopen(self.options.output.resolve()), evaluation, "pruned", reporter, team)
            unscored, record = record, records.add_scores(record, dense, pruned)
            team.on_first(functools.partial(self._write_pages, record, unscored))
        record = self._with_samples(
            record, {"dense": lambda: model, "pruned": lambda: reopen(self.options.output.resolve())}
        )
        self._left = "finished"
        team.on_first(self._complete)
        return record

    def _opening(self, work: Run) -> Record:
        """The part of the record that is known before the work."""
        masks = records.origin(work.masks.masks) if work.masks else {}
        before = records.opening(self.model, work.recipe, work.calibration, self._digest(), self.team.size)
        return before | masks | (records.packed_form(self._packing.values) if self._packing else {})

    def _packer(self, recipe: Recipe) -> Packing | None:
        """What packs the output; None for a dense one."""
        if not self.options.packed:
            return None
        return Packing(packed_layouts(self.model.skeleton), recipe.bits or 16)

    def _digest(self) -> str:
        """The fingerprint of the model's weights, read once."""
        if not self._fingerprint:
            self.reporter.stage("checking weights", 1)
            self._fingerprint = self.team.on_first(lambda: fingerprint(self.model.source))
            self.reporter.step()
        return self._fingerprint

    def _known(self, work: Run) -> Findings | None:
        """What the allocator found out for this very run before.

        To measure again takes long, and may differ in the last digit.
        """
        allocator = work.recipe.build_allocator()
        if not allocator.measures and not allocator.trials:
            return None
        now = records.identity(self._opening(work))
        return self.team.on_first(lambda: self._measured_before(now))

    def _measured_before(self, now: Identity) -> Findings | None:
        assert self.writer is not None
        if self.writer.reopened:
            record = read_record(self.writer.output)
            found = records.measured(record) if not _differs(record, now) else None
            return Findings(*found) if found else None
        journal = self.writer.journal
        if not journal.blocks:
            return None
        self.writer.check_identity(now)
        parts = journal.find("measures") or [{}, {}]
        return Findings(*({int(number): value for number, value in part.items()} for part in parts))

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
                f"output folder {self.options.output} holds another finished run: {differs}; "
                "choose another with --output or replace it with --overwrite"
            )
        return None

    def _begin(self, before: Record, matrices: Container[str]) -> None:
        """Start writing. `matrices`: the names of those that will have a mask."""
        assert self.writer is not None
        skeleton = self.model.skeleton
        shapes = {t.key: t.shape for t in all_targets(skeleton) if t.name in matrices}
        files = self.model.files
        companions = files.companions(self.options.trust_remote_code) if files else None
        exact, shards = before["recipe"].get("precision") == "float32", len(skeleton.blocks) + 1
        self.writer.begin(records.identity(before), shards, shapes, companions, exact, self._packing)

    def _keep_findings(self, plan: Plan) -> None:
        """Keep what the allocator found out, for a run that goes on with this one."""
        assert self.writer is not None
        if (plan.measures or plan.losses) and not self.writer.journal.find("measures"):
            self.writer.journal.add({"measures": [plan.measures, plan.losses]})

    def _scores(self, which: str, model: Model, evaluation: EvaluationSpec) -> Scores:
        """The scores of a model beside the result, from the journal where this run has measured them before.

        Args:
            which: `dense` or `start`.
        """
        key = evaluation.key(model.skeleton.dtype)
        known = self.team.tell(self.writer.journal.find(which) if self.writer else None)
        if known and known["key"] == key:
            return Scores(known["perplexity"], known["tasks"], known["seconds"])
        scores = score(model, evaluation, which, self.reporter, self.team)
        if self.writer and self.writer.journal.identity is not None:
            self.writer.journal.add({which: {"key": key, **dataclasses.asdict(scores)}})
        return scores

    def _check_space(self, needed: int) -> None:
        """Raise `ValueError` if there is no room for so many bytes, those of an unfinished run included."""
        assert self.writer is not None
        folder = self.writer.folder
        there = sum(file.stat().st_size for file in folder.iterdir()) if folder.is_dir() else 0
        check_space(self.options.output, needed - there)

    def _prune(self, work: Run, before: Record) -> Record:
        skeleton, writer, team = self.model.skeleton, self.writer, self.team
        done, exact = team.tell((writer.finished, writer.exact) if writer else ([], []))
        clock = Clock(skeleton.device)
        if work.plan.seconds:
            clock.seconds["allocate"] = work.plan.seconds
        if writer and done:
            clock.seconds |= writer.journal.blocks[-1]["seconds"]
        devices.reset_peak_device_memory(skeleton.device)
        blocks = len(skeleton.blocks)
        self.reporter.stage("pruning blocks", blocks)
        if done:
            self.reporter.note(
                f"{len(done)} of {blocks} blocks are finished; their outputs are computed again, "
                "then the run goes on"
            )
        progress = Progress(self.reporter, blocks, len(done), self.options.time_limit, work.recipe.name)

        def block_done(block: Block) -> None:
            if writer:
                shard = Shard(block.shard, block.masks, block.rows, block.scales, block.exact)
                writer.block(block.number + 1, shard, block.clock.seconds)
            progress.block(block.number + 1)

        work = dataclasses.replace(
            work, folder=writer.folder if writer else self.options.output.resolve().parent
        )
        with devices.PrivateMemory() as memory:
            if len(done) < blocks:
                layouts = self._packing.layouts if self._packing else {}
                source = Overlay(self.model.source, [*done, *exact], layouts)
                corridor.prune_blocks(work, source, len(done), clock, block_done)
            return team.on_first(lambda: self._finish(before, clock, memory))

    def _finish(self, before: Record, clock: Clock, memory: devices.PrivateMemory) -> Record:
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
        record = speed.measured(record, writer.folder, model.skeleton, self.reporter)
        report.write(writer.folder, record, writer.output.name)
        writer.finish()
        return record

    def _with_samples(self, record: Record, writers: Writers) -> Record:
        """The record with the texts that were wished for, and pages that show them."""
        wish = self.options.samples
        if wish.met(record):
            return record
        self._left = "complete but for the texts of its report"
        known = self._dense_samples()
        left = writers if known is None else {name: of for name, of in writers.items() if name != "dense"}
        found = self.team.on_first(lambda: with_samples(record, left, wish, self.reporter, known))
        self.team.on_first(lambda: self._write_pages(found, record))
        return found

    def _dense_samples(self) -> Record | None:
        """The texts of the dense model, where they are known."""
        return None

    def _write_pages(self, record: Record, before: Record) -> None:
        """Record, card and report anew, now with scores; a card that was edited by hand stays."""
        assert self.writer is not None
        folder = self.writer.output
        if not report.write(folder, record, folder.name, before):
            self.reporter.note(
                f"README.md in {self.options.output} was edited by hand and stays as it is; "
                "the scores are in report.html"
            )

    def _complete(self) -> None:
        assert self.writer is not None
        self.writer.complete()

    def close(self, error: BaseException | None) -> None:
        """Release the output; an error is told what is kept of the run, see `close`."""
        if self.writer is not None:
            blocks, begun = len(self.model.skeleton.blocks), self._begun()
            close(self.writer, error, self.options.output, blocks, self._left, begun)

    def _begun(self) -> str:
        """What is kept before the first block is finished, in words; empty for nothing."""
        return ""


def close(
    writer: CheckpointWriter,
    error: BaseException | None,
    output: Path,
    blocks: int,
    left: str,
    begun: str = "",
) -> None:
    """Close a writer.

    An error gets two attributes: `kept`, what is kept of the run in words, and `resumable`, whether the run
    can go on.

    Args:
        output: the folder as the user named it.
        blocks: how many the run has.
        left: how far the output is, once it is in place.
        begun: what is kept before the first block is finished, in words; empty for nothing.
    """
    moved, finished = writer.moved, writer.close()
    if error is None or not (moved or finished or begun):
        return
    done = f"{finished} of {blocks} blocks are finished and kept" if finished else begun
    kept = f"{output} is {left}" if moved else done
    error.kept = kept  # type: ignore[attr-defined]
    error.resumable = not (moved and left == "finished")  # type: ignore[attr-defined]


def _differs(record: Record, now: Identity) -> str | None:
    """What differs between a finished run and this one, None when nothing does."""
    try:
        return difference(records.identity(record), now)
    except (LookupError, TypeError, AttributeError):
        return "its record is not of this program"


def scored(record: Record, evaluation: EvaluationSpec) -> bool:
    """Whether a record holds all scores that are asked for."""
    have = record["evaluation"]
    return set(evaluation.rows) <= set(have["perplexity"]) and set(evaluation.tasks) <= set(have["tasks"])


def _save_companions(model: Model, folder: Path) -> None:
    model.instance.config.save_pretrained(folder)
    if getattr(model.instance, "generation_config", None) is not None:
        model.instance.generation_config.save_pretrained(folder)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)
