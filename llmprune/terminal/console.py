"""Where text goes: the terminal, a pipe or a notebook; tables and prose laid out for it, and progress as bars or as lines."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from llmprune.terminal import layout

_UNFOLDED = 1 << 20  # into a file or a pipe, a row is a line
_BARS_WIDTH = 78  # columns that a line of progress takes with its bar


class OutputClosed(BaseException):
    """Whoever read the output reads no more of it (`llmprune inspect DIR | head`). No error: nothing that catches those may hold it up."""


class Screen(Console):
    """A console that lays text out for the width of a terminal. Into a pipe nothing is folded, unless `COLUMNS` is set."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)
        self.folds = self.is_terminal or self.is_jupyter or "COLUMNS" in os.environ

    def on_broken_pipe(self) -> None:
        """What rich calls where it cannot write; its own way would end the process."""
        raise OutputClosed

    def verbatim(self, text: str = "", style: str | None = None) -> None:
        """A line as it is: a command to copy, or one that was folded before."""
        self.print(text, style=style, soft_wrap=True)

    def say(self, text: str, style: str | None = None) -> None:
        """Prose: folded at words on a terminal, one line in a pipe."""
        self.verbatim("\n".join(layout.folded(text, self.width)) if self.folds else text, style)

    def table(self, title: str, rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> None:
        """A title and rows, each with a note last."""
        if title:
            self.verbatim(title, "bold")
        self.verbatim("\n".join(layout.table(rows, self.width if self.folds else _UNFOLDED, head)))


def in_notebook() -> bool:
    """Whether this runs in an IPython kernel, which draws for its user; IPython in a terminal is none."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def for_python() -> Screen:
    """Where a Python function tells its progress: the notebook's cell, else stderr, since stdout is the caller's."""
    if not in_notebook():
        return Screen(stderr=True)
    # Without its widgets a notebook cannot be drawn over, and rich would warn at every bar.
    return (
        Screen()
        if importlib.util.find_spec("ipywidgets")
        else Screen(force_jupyter=False, force_terminal=False)
    )


def draw_alone(downloads: bool = True) -> Callable[[], None]:
    """Silence the bars of the libraries below us, which would break ours, but for `downloads`; returns what draws them again."""
    import huggingface_hub
    from transformers.utils import logging

    drew = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # and with it the hub's, whose downloads come before any bar of ours
    if downloads:
        huggingface_hub.utils.enable_progress_bars("huggingface_hub.snapshot_download")
    return logging.enable_progress_bar if drew else lambda: None


class Bars:
    """Progress drawn over and over: a bar per stage. A narrow terminal gets its figures alone."""

    def __init__(self, console: Screen) -> None:
        wide = [BarColumn(bar_width=24)] if console.width >= _BARS_WIDTH else []
        times = (
            [TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn()]
            if console.width >= _BARS_WIDTH - 24
            else []
        )
        self._progress = Progress(
            TextColumn("{task.description}"), *wide, MofNCompleteColumn(), *times, console=console
        )
        self._task: Any = None

    def stage(self, title: str, steps: int) -> None:
        self._progress.start()
        self._task = self._progress.add_task(title, total=steps)

    def step(self) -> None:
        task = next(t for t in self._progress.tasks if t.id == self._task)
        if task.finished:
            self._progress.reset(self._task)
        self._progress.advance(self._task)

    def close(self) -> None:
        if self._task is not None:
            self._progress.stop()  # one that never started would still print an empty line


class Lines:
    """Progress where nothing can be drawn over: a line when a stage is done, and now and then one on the way."""

    EVERY = 60.0  # seconds

    def __init__(self, console: Screen) -> None:
        self._console, self._title, self._done, self._steps = console, "", 0, 0
        self._started = self._told = 0.0

    def stage(self, title: str, steps: int) -> None:
        self._title, self._done, self._steps = title, 0, steps
        self._started = self._told = time.monotonic()

    def step(self) -> None:
        if self._done >= self._steps:
            self.stage(self._title, self._steps)
        self._done += 1
        now = time.monotonic()
        if self._done == self._steps or now - self._told >= self.EVERY:
            self._told, passed = now, now - self._started
            left = passed / self._done * (self._steps - self._done)
            self._console.verbatim(
                f"{self._title}  {self._done}/{self._steps}  {_clock(passed)}  ETA {_clock(left)}"
            )

    def close(self) -> None:
        pass


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
