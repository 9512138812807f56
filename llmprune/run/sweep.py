"""A sweep: the runs of a grid one after the other, which share what does not depend on the cell."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmprune.checkpoint.contents import REPORT, SWEEP
from llmprune.checkpoint.journal import difference
from llmprune.checkpoint.placement import check_space
from llmprune.checkpoint.reader import fingerprint
from llmprune.checkpoint.sweep_folder import SweepFolder
from llmprune.common.messages import duration, is_failure
from llmprune.contracts import CalibrationSet
from llmprune.evaluation.scores import EvaluationSpec, Scores, score
from llmprune.machine import device as devices
from llmprune.machine.interrupts import INTERRUPTS
from llmprune.model.opening import Model
from llmprune.planning.cells import SweepPlan, dense_bytes, uses_dense
from llmprune.planning.grid import Cell, key_of
from llmprune.record import record as records
from llmprune.record import sweeps
from llmprune.record.figures import Record
from llmprune.record.sweep_page import html_page
from llmprune.record.sweep_plot import plot
from llmprune.record.sweep_table import csv_table, markdown, perplexity_text
from llmprune.run.cell import CellReporter, CellRun
from llmprune.run.preparation import Options, Request, calibrated
from llmprune.run.reporter import RunReporter
from llmprune.run.samples import samples_of
from llmprune.run.sharing import DenseInputs, Shared


@dataclass(frozen=True)
class Work:
    """What a sweep is to do.

    Attributes:
        cells: in the order in which they are run.
        rows: the calibration rows of every cell, by its name.
        evaluation: what is scored, prepared.
        plan: of the cells.
        grid: what was given, for the record.
        keep: whose weights are kept: of `none`, of the `best` cell of every amount, of `all`.
        options: of every run; its output is that of the sweep.
    """

    cells: Sequence[Cell]
    rows: Mapping[str, CalibrationSet]
    evaluation: EvaluationSpec
    plan: SweepPlan
    grid: Record
    keep: str
    options: Options


class Sweep:
    """Runs the cells that are not finished yet; `record` is what `sweep.json` holds.

    Args:
        model: as opened.
        work: what to do.
        folder: of the sweep.
        reporter: is told the progress.
        remark: tells what the user should know in any case.
    """

    def __init__(
        self,
        model: Model,
        work: Work,
        folder: SweepFolder,
        reporter: RunReporter,
        remark: Callable[[str], None],
    ) -> None:
        self._model, self._work, self._folder, self._reporter = model, work, folder, reporter
        self._remark, self._told = remark, set[str]()
        self._shared: dict[str, Shared] = {}
        self._started, self._before = time.monotonic(), 0.0
        self._begun = False
        self._running: Cell | None = None
        self._ahead: Sequence[Cell] = ()  # the running cell and those that are still to be run
        self.record: Record = {}

    def check(self) -> None:
        """Compare with the sweep that is to go on, and see what is left to do; nothing is written.

        Raises:
            ValueError: it is another sweep, or the disk is too small.
        """
        self._reporter.stage("checking weights", 1)
        digest = fingerprint(self._model.source)
        self._reporter.step()
        first = self._work.cells[0]
        about = records.opening(self._model, first.recipe, self._work.rows[first.name], digest, 1)
        texts = list(self._work.evaluation.rows)
        key = self._work.evaluation.key(self._model.skeleton.dtype)
        work, ranked_by = self._work, texts[0] if texts else None
        self.record = sweeps.opening(about, work.grid, work.keep, key, ranked_by, work.options.packed)
        found = self._folder.found
        entries = [self._entry(cell) for cell in self._work.cells]
        if found is not None:
            entries = self._taken_over(found, entries)
        self.record["cells"] = entries
        left = sum(self._work.plan.plans[cell.name].disk for cell in self.left)
        check_space(self._folder.output, min(left, self._work.plan.disk))

    def _entry(self, cell: Cell) -> Record:
        rows = self._work.rows[cell.name]
        recipe = calibrated(cell.recipe, rows)
        return sweeps.waiting(
            cell.name, (cell.method, cell.amount), recipe.as_dict(), key_of(recipe), rows.digest
        )

    def _taken_over(self, found: Record, entries: list[Record]) -> list[Record]:
        """The entries, those of finished cells as the sweep that goes on has them."""
        output = self._folder.output
        before, now = sweeps.identity(found), sweeps.identity(self.record)
        differs = difference(before, now)
        if before["evaluation"] != now["evaluation"]:  # fingerprints, which tell a user nothing
            differs = "it is scored on other texts or tasks, or with another --limit or --eval-seqlen"
        known = {cell["key"]: cell for cell in found["cells"]}
        missing = set(known) - {entry["key"] for entry in entries}
        if not differs and missing:
            name = next(cell["name"] for cell in found["cells"] if cell["key"] in missing)
            differs = f"its cell {name} is not among these"
        if not differs and any(known.get(e["key"], e)["name"] != e["name"] for e in entries):
            differs = "its cells have other names"
        if differs:
            raise ValueError(
                f"the sweep in {output.name} is another one: {differs}; give its options, or begin anew with "
                f"{'--overwrite' if found['finished'] else '--restart'}"
            )
        self.record |= {"dense": found["dense"], "protocol": found["protocol"], "seconds": found["seconds"]}
        if "samples" in found:
            self.record["samples"] = found["samples"]
        self._before = found["seconds"]["total"]
        return [self._still_done(known.get(entry["key"]), entry) for entry in entries]

    def _still_done(self, known: Record | None, entry: Record) -> Record:
        if known is None or known["status"] != sweeps.DONE:
            return entry
        lost = known["weights_kept"] and not self._folder.holds_weights(known["name"])
        return entry if lost else known

    @property
    def left(self) -> list[Cell]:
        """The cells that are not finished, those that failed before among them."""
        done = set(sweeps.names_of(self.record["cells"], sweeps.DONE))
        return [cell for cell in self._work.cells if cell.name not in done]

    def run(self, reopen: Callable[[Any], Model]) -> None:
        """Run what is left. An error in a cell is kept in its entry, and the others go on.

        Args:
            reopen: opens the model of the sweep (None), or a folder, with the same options.
        """
        self._folder.begin()
        self._begun = True
        self._settle()
        dense = sweeps.scores_of(self.record) or self._score_dense()
        self._write_dense_texts()
        queue = self.left
        for place, cell in enumerate(queue):
            self._running, self._ahead = cell, queue[place:]
            try:
                entry = sweeps.done(self._entry_of(cell), self._run_cell(cell, dense, reopen))
            except BaseException as error:
                if INTERRUPTS.came or not is_failure(error):
                    raise
                self._remark(f"cell {cell.name} failed: {sweeps.error_line(error)}")
                entry = sweeps.failed(self._entry_of(cell), error)
                self._model = reopen(None)  # blocks of it may still be loaded
            self.record = sweeps.with_cell(self.record, entry)
            self._settle()
            if entry["status"] == sweeps.DONE:
                self._reporter.note(self._scored(entry))
        self._running = None
        self._finish()

    def _scored(self, entry: Record) -> str:
        """The time and the perplexities of a finished cell, in a line."""
        dense = self.record["dense"]["perplexity"]
        scores = [
            f"perplexity {name} {perplexity_text(value)} (dense {perplexity_text(dense[name]['value'])})"
            for name, value in entry["perplexity"].items()
        ]
        return ", ".join([f"{entry['name']} took {duration(entry['seconds']['total'])}", *scores])

    def _score_dense(self) -> Scores:
        scores = score(self._model, self._work.evaluation, "dense", self._reporter)
        self.record = sweeps.with_dense(self.record, scores)
        self._settle()
        return scores

    def _write_dense_texts(self) -> None:
        """The texts of the dense model, with which every cell's report has its own."""
        wish = self._work.options.samples
        if wish.met(self.record):
            return
        source = self.record["model"]["source"]
        self.record["samples"] = samples_of(source, {"dense": lambda: self._model}, wish, self._reporter)
        self._settle()

    def _entry_of(self, cell: Cell) -> Record:
        return next(entry for entry in self.record["cells"] if entry["name"] == cell.name)

    def _run_cell(self, cell: Cell, dense: Scores, reopen: Callable[[Any], Model]) -> Record:
        number = list(self._work.cells).index(cell) + 1
        place = f"{number}/{len(self._work.cells)} {cell.name}"
        reporter = CellReporter(self._reporter, place, self._told, self._remark)
        options = dataclasses.replace(
            self._work.options,
            output=self._folder.cell(cell.name),
            overwrite=cell.name in self._folder.old or self._folder.spent(cell.name),
            resume=True,
            remarks=cell.remarks,
        )
        source = cell.recipe.calibration.source
        request = Request(
            recipe=cell.recipe,
            calibration=None if source == "auto" else source,
            evaluation=self._work.evaluation,
            rows=self._work.rows[cell.name],
            shared=self._sharing(cell),
        )
        run = CellRun(self._model, options, reporter, self.record, dense)
        try:
            record = run.make(request, reopen)
        except BaseException as error:
            run.close(error)
            raise
        run.close(None)
        return record

    def _sharing(self, cell: Cell) -> Shared:
        """What the cell shares with those that have the same calibration rows."""
        rows = self._work.rows[cell.name]
        digests = {other.name: self._work.rows[other.name].digest for other in self._ahead}
        others = [other for other in self._ahead if digests[other.name] == rows.digest]
        self._shared = {key: shared for key, shared in self._shared.items() if key in digests.values()}
        shared = self._shared.setdefault(rows.digest, Shared())
        using = [other for other in others if uses_dense(other)]
        if len(using) > 1 and shared.inputs is None:
            room = (devices.available_memory() - 2 * self._work.plan.memory) // 2
            shared.inputs = DenseInputs(max(0, room), dense_bytes(rows, self._model))
        elif not using:
            shared.inputs = None
        return shared

    def _settle(self) -> None:
        """Write record and tables, then remove the weights that are not to be kept."""
        total = round(self._before + time.monotonic() - self._started, 3)
        kept = sweeps.with_kept(self.record, self._folder.holds_weights)
        self.record = kept | {"seconds": {"total": total}}
        if self._folder.old:
            self.record["replaces"] = self._folder.old
        texts = {"table.md": markdown(self.record), "table.csv": csv_table(self.record)}
        files = {name: text.encode() for name, text in texts.items()}
        self._folder.write({SWEEP: sweeps.as_json(self.record), **files})
        for entry in self.record["cells"]:
            if entry["status"] == sweeps.DONE and not entry["weights_kept"]:
                self._folder.strip(entry["name"])

    def _finish(self) -> None:
        """Plot, page, and the end of an older sweep that this one replaces."""
        for name in set(self._folder.old) - {cell.name for cell in self._work.cells}:
            self._folder.remove(name)
        self._folder.old = []
        self.record.pop("replaces", None)
        self.record["finished"] = not sweeps.names_of(self.record["cells"], sweeps.FAILED)
        drawn = plot(self.record)
        files = {} if drawn is None else {"sweep.png": drawn}
        self._folder.write({**files, REPORT: html_page(self.record).encode()})
        self._settle()

    def close(self, error: BaseException | None) -> None:
        """Release the folder; an error is told what is kept, as `production.close` does."""
        self._folder.close()
        if error is None or not self._begun:
            return
        done, of = len(sweeps.names_of(self.record["cells"], sweeps.DONE)), len(self._work.cells)
        kept = f"{done} of {of} cells are finished and kept in {self._work.options.output}"
        if self._running is not None:
            blocks = self._folder.blocks_done(self._running.name)
            if blocks:
                kept += f", and {blocks} of {len(self._model.skeleton.blocks)} blocks of {self._running.name}"
        error.kept, error.resumable = kept, True  # type: ignore[attr-defined]
