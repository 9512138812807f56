"""Where the Python functions report progress: to the caller's reporter, on a terminal, or nowhere."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmprune.contracts import CalibrationSet
from llmprune.machine.processes import Team
from llmprune.model.opening import Model
from llmprune.planning.plan import Plan
from llmprune.recipe.types import Recipe
from llmprune.run.reporter import RunReporter, Silent
from llmprune.terminal.console import draw_alone, for_python, in_notebook
from llmprune.terminal.screen import Terminal


class WarningsOnly(Silent):
    """Reports nothing but the plan's remarks, each as a Python warning."""

    def plan(
        self, model: Model, recipe: Recipe, plan: Plan, calibration: CalibrationSet, output: Path
    ) -> None:
        """Warn of the remarks."""
        for remark in plan.remarks:
            remark_to(self, remark)


def remark_to(reporter: RunReporter, text: str) -> None:
    """Report something the user should know in any case: where nothing else is reported, as a warning."""
    if isinstance(reporter, WarningsOnly):
        warnings.warn(text, stacklevel=2)
    else:
        reporter.note(text)


@contextmanager
def reporting(reporter: RunReporter | None, progress: bool | None, team: Team) -> Iterator[RunReporter]:
    """The reporter of a call, closed at the end.

    Args:
        reporter: the caller's own; None for none.
        progress: draw on stderr or in the notebook's cell; None: only in a notebook.
        team: the processes of this run, of which only the first reports.

    Raises:
        ValueError: both a reporter and `progress=True` are given.
    """
    if reporter is not None and progress:
        raise ValueError("give a reporter, or progress=True for the one that draws, not both")
    if not team.first:
        yield Silent()
    elif reporter is not None:
        yield reporter
    elif progress or (progress is None and in_notebook()):
        terminal, restore_bars = Terminal(for_python()), draw_alone()
        try:
            yield terminal
        finally:
            terminal.close()
            restore_bars()
    else:
        yield WarningsOnly()
