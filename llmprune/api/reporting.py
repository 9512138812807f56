"""Whom a Python function tells how it goes: a reporter, the screen, or nobody but for what must be known."""

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


class Unheard(Silent):
    """Nobody is told how a run goes; what the user should know of it all the same is a Python warning."""

    def plan(
        self, model: Model, recipe: Recipe, plan: Plan, calibration: CalibrationSet, output: Path
    ) -> None:
        """The remarks alone."""
        for remark in plan.remarks:
            remark_to(self, remark)


def remark_to(told: RunReporter, text: str) -> None:
    """Something the user should know, even where nobody listens."""
    if isinstance(told, Unheard):
        warnings.warn(text, stacklevel=2)
    else:
        told.note(text)


@contextmanager
def telling(reporter: RunReporter | None, progress: bool | None, team: Team) -> Iterator[RunReporter]:
    """The reporter given, one that draws where progress is wanted (None: in a notebook), or nobody; of several processes one tells."""
    if reporter is not None and progress:
        raise ValueError("give a reporter, or progress=True for the one that draws, not both")
    if not team.first:
        yield Silent()
    elif reporter is not None or not (in_notebook() if progress is None else progress):
        yield Unheard() if reporter is None else reporter
    else:
        terminal, draw_again = Terminal(for_python()), draw_alone()
        try:
            yield terminal
        finally:
            terminal.close()
            draw_again()
