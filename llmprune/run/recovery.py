"""A recovery from its plan to the saved folder: locked, journalled, resumable, on one process or several."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llmprune.checkpoint.contents import BEST_STEP, RECORD, TRAINING
from llmprune.checkpoint.journal import remove
from llmprune.checkpoint.packed_tensor import Layout
from llmprune.checkpoint.packing import Packing
from llmprune.checkpoint.reader import fingerprint, read_record
from llmprune.evaluation.scores import EvaluationSpec, Scores, score
from llmprune.machine import device as devices
from llmprune.model.activations import in_memory, on_disk
from llmprune.model.opening import Model
from llmprune.model.targets import packed_layouts
from llmprune.planning.disk import predict_disk
from llmprune.record import record as record_of_run
from llmprune.record import recovery as records
from llmprune.record import report
from llmprune.record.figures import Record
from llmprune.run import speed
from llmprune.run.blockwise import BlockTasks, Place
from llmprune.run.clock import Clock
from llmprune.run.lesson import Lesson, whole_model
from llmprune.run.preparation import Options
from llmprune.run.production import Production, scored
from llmprune.run.reporter import RunReporter
from llmprune.run.samples import Writers, dense_texts
from llmprune.run.trained import Trained, TrainedWriter
from llmprune.run.training import Keeping, Training


def steps_of(lesson: Lesson) -> int:
    """How many steps the tokens are that were asked for.

    Raises:
        ValueError: fewer than the recipe has trainings, each of which takes one at least.
    """
    tokens = lesson.asked.tokens
    each, soup = lesson.rows.tokens.shape[1] * lesson.recipe.batch, lesson.recipe.soup
    steps, trainings = tokens // each, soup.phases * soup.copies
    if not steps:
        raise ValueError(
            f"tokens {tokens:,} are less than one step, of {lesson.recipe.batch} sequences of "
            f"{lesson.rows.tokens.shape[1]}; give at least {each}, or a smaller --seqlen or --set batch="
        )
    if steps < trainings:
        raise ValueError(
            f"recipe {lesson.recipe.name} trains {soup.copies} copies in each of {soup.phases} phases, and "
            f"{tokens:,} tokens are {steps} steps of {each:,}; give at least tokens {trainings * each}"
        )
    return steps - steps % trainings  # all trainings are of the same length


@dataclass(frozen=True)
class Scored:
    """The scores that stand beside those of the result: of the dense model, where it is known, and the
    start.
    """

    dense: Scores | Record | None
    start: Scores


class Recovery(Production):
    """One folder written: a model trained with its sparsity kept or evolved.

    Args:
        lesson: model, recipe, text and teacher.
        options: where the folder goes, and how.
        reporter: is told the progress.
    """

    def __init__(self, lesson: Lesson, options: Options, reporter: RunReporter) -> None:
        self.lesson = lesson
        self.steps = steps_of(lesson)
        self._beginning: Record = {}  # the record of the start
        self.plan = lesson.plan(self.steps)
        super().__init__(lesson.model, options, lesson.team, reporter)
        self._left = "trained and saved"

    def recover(self, evaluation: EvaluationSpec | None, reopen: Any) -> Record:
        """Train, save and score; returns the record."""
        lesson, team, reporter = self.lesson, self.team, self.reporter
        model, plan = lesson.model, self.plan
        plan.check()
        chosen = lesson.recipe.chosen
        for line in [f"recipe {lesson.recipe.name}, {chosen}", *plan.lines()] if chosen else plan.lines():
            reporter.note(line)
        shapes = {t.key: t.shape for t in lesson.targets}
        self._packing = Packing(packed_layouts(model.skeleton), 16) if self.options.packed else None
        team.on_first(lambda: self._check_space(self._disk()))
        before = self._before()
        record = team.on_first(lambda: self._made_before(before))
        if record is None:
            team.on_first(lambda: self._start(before, shapes))
            beside = self._beside(evaluation) if evaluation else None
            record = self._train(before)
        else:
            left = evaluation if evaluation and not scored(record, evaluation) else None
            beside = self._beside(left) if left else None
        if evaluation is not None and beside is not None:
            self._left = "trained and saved but not scored"
            result = score(reopen(self.options.output.resolve()), evaluation, "recovered", reporter, team)
            unscored, record = record, records.add_scores(record, beside.dense, beside.start, result)
            team.on_first(functools.partial(self._write_pages, record, unscored))
        record = self._with_samples(record, self._writers(reopen))
        self._left = "finished"
        team.on_first(self._complete)
        return record

    def _writers(self, reopen: Any) -> Writers:
        """What opens the models whose texts are compared: dense where it is at hand, start, and result."""
        lesson, base = self.lesson, self.lesson.base
        dense: dict[str, Callable[[], Model]] = {}
        if lesson.masking is None:
            dense = {"dense": lambda: lesson.model}
        elif base is not None:
            dense = {"dense": lambda: base, "start": lambda: lesson.model}
        else:
            dense = {"start": lambda: lesson.model}
        return {**dense, "pruned": lambda: reopen(self.options.output.resolve())}

    def _dense_samples(self) -> Record | None:
        """The texts of the dense model in the record of the start, where it is not at hand itself."""
        lesson, wish = self.lesson, self.options.samples
        if lesson.masking is None or lesson.base is not None:
            return None
        return dense_texts(self._beginning, wish)

    def _disk(self) -> int:
        """The most bytes there are at once: a file is written beside the one that it replaces."""
        state, best = self.plan.state, self.plan.result
        return max(
            2 * state + best, state + 2 * best, state + best + predict_disk(self.model, self.lesson.targets)
        )

    def _before(self) -> Record:
        """What the record says before the work."""
        lesson = self.lesson
        start = lesson.model.folder
        if start is not None and (start / RECORD).is_file():
            self._beginning = read_record(start)
        dense = self._digest() if lesson.masking is None else ""
        before = records.opening(
            lesson.model, self._beginning or None, lesson.recipe, lesson.rows, lesson.team.size, dense
        )
        before["recovery"]["text"]["held_out"] = len(lesson.split[1])
        before["recovery"] |= {
            "tokens": self.steps * lesson.recipe.batch * lesson.rows.tokens.shape[1],
            "steps": self.steps,
            "asked": lesson.asked._asdict(),
            "start": {"source": lesson.model.label, "digest": self._digest(), **self._masks()},
        }
        if lesson.aim is not None:
            before["recovery"]["aim"] = {"pattern": str(lesson.aim[0]), "sparsity": lesson.aim[1]}
        if lesson.base is not None:
            before["recovery"]["teacher"] = {
                "source": lesson.base.label,
                "digest": self._teacher(lesson.base),
            }
        return before | (record_of_run.packed_form() if self._packing else {})

    def _teacher(self, base: Model) -> str:
        """The fingerprint of the dense model.

        Raises:
            ValueError: the record of the start names it, and it has other weights now.
        """
        digest: str = self.team.on_first(lambda: fingerprint(base.source))
        known = self._beginning.get("model", {}).get("digest")
        if known and known != digest and not self.lesson.named:
            raise ValueError(
                f"{base.label}, which the record names as the dense model, has other weights than the one "
                "that was pruned; name the right one with --teacher"
            )
        return digest

    def _masks(self) -> Record:
        """A fingerprint of the masks of the start, and what they prune; empty for a dense one."""
        masking = self.lesson.masking
        if masking is None:
            return {}
        masks = masking.masks
        digest, sparsity = self.team.on_first(lambda: (masks.digest, masks.sparsity))
        return {"masks": digest, "sparsity": round(sparsity, 6)}

    def _made_before(self, before: Record) -> Record | None:
        """The record of the finished recovery that `resume` found in the output folder."""
        assert self.writer is not None
        if not self.writer.reopened:
            return None
        record = read_record(self.writer.output)
        differs = records.difference_of(record, before)
        if not differs:
            self.reporter.note(f"{self.options.output} is trained already")
            return record
        if not self.writer.overwrite:
            raise ValueError(
                f"output folder {self.options.output} holds another finished run: {differs}; "
                "choose another with --output or replace it with --overwrite"
            )
        return None

    def _start(self, before: Record, shapes: Mapping[str, tuple[int, int]]) -> None:
        assert self.writer is not None
        files = self.model.files
        companions = files.companions(self.options.trust_remote_code) if files else None
        identity = records.identity(before)
        self.writer.begin(
            identity, len(self.model.skeleton.blocks) + 1, shapes, companions, packing=self._packing
        )

    def _beside(self, evaluation: EvaluationSpec) -> Scored:
        """The scores of the start, and of the dense model where it is at hand."""
        lesson = self.lesson
        start = self._scores("start", lesson.model, evaluation)
        if lesson.masking is None:
            return Scored(start, start)
        if lesson.base is None:
            return Scored(self._beginning.get("evaluation"), start)
        return Scored(self._scores("dense", lesson.base, evaluation), start)

    # -- training -------------------------------------------------------------------------------------------

    def _train(self, before: Record) -> Record:
        writer, team = self.writer, self.team
        clock = Clock(self.model.skeleton.device)
        with devices.PrivateMemory() as memory:
            if self.lesson.recipe.scope == "block":
                return self._by_blocks(before, clock, memory)
            trained = team.tell(writer.journal.find("trained") if writer else None)
            if trained is None:
                trained = team.tell(self._learn(clock) | {"memory": memory.peak})
                if writer:
                    writer.journal.add({"trained": trained})
            if writer and writer.journal.blocks:
                clock.seconds |= writer.journal.blocks[-1]["seconds"]
            clock.seconds["train"] = trained["seconds"]  # those of earlier processes too
            memory.peak = max(filter(None, (memory.peak, trained["memory"])), default=None)
            before = {**before, "recovery": before["recovery"] | records.outcome(trained)}
            return team.on_first(lambda: self._write(before, clock, memory, trained))

    def _by_blocks(self, before: Record, clock: Clock, memory: Any) -> Record:
        """Train and write one block after the other."""
        lesson, writer, team = self.lesson, self.writer, self.team
        names = list(self.model.skeleton.blocks)
        finished = team.tell(writer.finished if writer else [])
        (spec, _) = lesson.recipe.objective[0]
        folder = writer.folder if writer else self.options.output.resolve().parent
        place = Place(on_disk(folder) if self._offloaded() else in_memory, finished, self._layouts())
        tasks = BlockTasks(lesson, place, spec.options["inputs"])
        putting = self._putting(before)
        clock.lap("read")
        for number, task in tasks:
            watch: dict[str, Any] = {}
            weights: dict[str, Tensor] = {}
            if number >= len(finished):
                self.reporter.note(f"block {number + 1} of {len(names)}")
                best = {}
                if task is not None:
                    training = Training(
                        task, lesson.recipe, self.steps, Keeping(memory=True), team, self.reporter
                    )
                    training.run()
                    _check_best(training.watch.best)
                    best, watch = training.best, dataclasses.asdict(training.watch)
                clock.lap("train")
                weights = putting.block(number, best, records.outcome(watch | {"seconds": None}), clock)
            tasks.advance(number, weights)
            clock.lap("forward")
        outcome = records.outcome_of_blocks(writer.rows) if writer else {}
        before = {**before, "recovery": before["recovery"] | outcome}
        return team.on_first(lambda: self._finished(before, clock, memory, {}))

    def _offloaded(self) -> bool:
        """Whether block inputs of student and teacher are too large for the memory."""
        skeleton, tokens = self.model.skeleton, self.lesson.rows.tokens
        needed = 2 * tokens.numel() * skeleton.width * skeleton.dtype.itemsize
        return needed > self.team.on_first(devices.available_memory) // 2

    def _layouts(self) -> dict[str, Layout]:
        return dict(self._packing.layouts) if self._packing else {}

    def _learn(self, clock: Clock) -> dict[str, Any]:
        lesson, writer = self.lesson, self.writer
        task = whole_model(lesson)
        clock.lap("read")
        keeping = Keeping(writer.folder, self._note_state) if writer else Keeping()
        training = Training(task, lesson.recipe, self.steps, keeping, self.team, self.reporter)
        training.run()
        clock.lap("train")
        return dataclasses.asdict(training.watch)

    def _begun(self) -> str:
        """What is kept of a training, in words; empty before it has begun."""
        writer = self.writer
        if writer is None or writer.moved or not writer.journal.trains:
            return ""
        if writer.journal.find("trained"):
            return "the training is finished; what is left is to write and to score it"
        if (writer.folder / TRAINING).is_file():
            return "the training is kept as it was last saved, which it is every 5 minutes"
        return "the training was not saved yet and will begin again"

    def _note_state(self) -> None:
        """Say in the journal that there is something to go on with."""
        assert self.writer is not None
        if not self.writer.journal.find("training"):
            self.writer.journal.add({"training": True})

    # -- writing --------------------------------------------------------------------------------------------

    def _write(self, before: Record, clock: Clock, memory: Any, trained: Mapping[str, Any]) -> Record:
        assert self.writer is not None
        _check_best(trained["best"])
        # Once all is written, the file of the best step may be gone, and nothing needs it any more.
        others = {} if self.writer.indexed else self._putting(before).whole(clock)
        return self._finished(before, clock, memory, others)

    def _putting(self, before: Record) -> TrainedWriter:
        return TrainedWriter(self.lesson, self.writer, before["rows"], self.reporter)

    def _finished(self, before: Record, clock: Clock, memory: Any, others: Mapping[str, Tensor]) -> Record:
        writer, model = self.writer, self.model
        assert writer is not None
        if not writer.indexed:
            writer.rest(Trained(model.source, others))
            clock.lap("write")
            if model.files:
                writer.copy_companions(model.files, self.options.trust_remote_code)
            model.check()
            writer.index()
        for name in (TRAINING, BEST_STEP):
            remove(writer.folder / name)
        record = record_of_run.complete(before, model, writer.rows, clock.seconds, memory.peak, writer)
        record = speed.measured(record, writer.folder, model.skeleton, self.reporter)
        report.write(writer.folder, record, writer.output.name)
        writer.finish()
        return record


def _check_best(best: float | None) -> None:
    """Raise `RuntimeError` for a training of which nothing may be saved."""
    if best is None:
        raise RuntimeError(
            "no step of the training had the sparsity that was asked for; give it more --tokens"
        )
