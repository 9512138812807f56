"""A run of one cell of a sweep: what it need not do again, and how it reports."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmprune.evaluation.scores import EvaluationSpec, Scores
from llmprune.machine.processes import ALONE
from llmprune.model.opening import Model
from llmprune.record.figures import Record
from llmprune.run.preparation import Options
from llmprune.run.production import Production
from llmprune.run.reporter import RunReporter


class CellReporter:
    """Reports a cell's run: its stages with the number and the name of the cell, its remarks once a sweep."""

    def __init__(
        self, reporter: RunReporter, place: str, told: set[str], remark: Callable[[str], None]
    ) -> None:
        self._reporter, self._place, self._told, self._remark = reporter, place, told, remark

    def plan(self, model: Any, recipe: Any, plan: Any, calibration: Any, output: Path) -> None:
        """Tell the remarks that no cell before had."""
        for text in plan.remarks:
            if text not in self._told:
                self._told.add(text)
                self._remark(text)

    def stage(self, title: str, steps: int) -> None:
        """Begin a stage."""
        self._reporter.stage(f"{self._place}: {title}", steps)

    def step(self) -> None:
        """Count a step."""
        self._reporter.step()

    def note(self, text: str) -> None:
        """Pass a note on."""
        self._reporter.note(f"{self._place}: {text}")


class CellRun(Production):
    """The run of one cell, for which the dense model is scored and its weights are checked already.

    Args:
        known: the record of the sweep, which has the dense model's scores, digest and texts.
    """

    def __init__(
        self, model: Model, options: Options, reporter: RunReporter, known: Record, dense: Scores
    ) -> None:
        self._digest_known, self._dense_scores = str(known["model"]["digest"]), dense
        self._texts_known = known.get("samples")
        super().__init__(model, options, ALONE, reporter)

    def _digest(self) -> str:
        return self._digest_known

    def _dense_samples(self) -> Record | None:
        return self._texts_known

    def _scores(self, which: str, model: Model, evaluation: EvaluationSpec) -> Scores:
        # It took this run no time: the seconds stand in the record of the sweep.
        return dataclasses.replace(self._dense_scores, seconds=0.0)
