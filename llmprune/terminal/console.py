"""Prints text, tables and progress on a terminal, in a notebook or into a pipe, laid out for its width."""

from __future__ import annotations

import codecs
import contextlib
import importlib.util
import io
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

_UNFOLDED = 1 << 20  # the width for files and pipes, in which a row of a table is one line
_BARS_WIDTH = 78  # columns that a line of progress takes, with its bar


_PLAIN = {"±": "+-", "×": "x", "–": "-", "…": "...", "’": "'"}


def print_anywhere() -> None:
    """Let stdout and stderr take any text: what their encoding lacks is replaced, and ends no command."""

    def plain(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeEncodeError)
        lost = error.object[error.start : error.end]
        return "".join(_PLAIN.get(letter, "?") for letter in lost), error.end

    codecs.register_error("llmprune", plain)
    for stream in (sys.stdout, sys.stderr):
        # With UTF-8 there is nothing to do; a stream that is closed already cannot be changed.
        if isinstance(stream, io.TextIOWrapper) and codecs.lookup(stream.encoding).name != "utf-8":
            with contextlib.suppress(OSError):
                stream.reconfigure(errors="llmprune")


class OutputClosed(BaseException):
    """The reader of stdout is gone (`llmprune inspect DIR | head`).

    Not an `Exception`, so that no code that handles errors catches it on its way.
    """


class Screen(Console):
    """A console that folds text to the width of the terminal; in a pipe only where `COLUMNS` is set."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)
        self.folds = self.is_terminal or self.is_jupyter or "COLUMNS" in os.environ

    def on_broken_pipe(self) -> None:
        """Called by rich where it cannot write; rich's own version would end the process."""
        raise OutputClosed

    def verbatim(self, text: str = "", style: str | None = None) -> None:
        """Print a line without folding it: a command to copy, or text that is laid out already."""
        self.print(text, style=style, soft_wrap=True)

    def piece(self, text: str) -> None:
        """Print a piece of a text at once, and stay in its line."""
        self.print(text, end="", soft_wrap=True)
        self.file.flush()

    def say(self, text: str, style: str | None = None) -> None:
        """Print prose: folded at words on a terminal, one line in a pipe."""
        self.verbatim("\n".join(layout.folded(text, self.width)) if self.folds else text, style)

    def table(self, title: str, rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> None:
        """Print a title and a table; the last cell of each row is its note."""
        if title:
            self.verbatim(title, "bold")
        self.verbatim("\n".join(layout.table(rows, self.width if self.folds else _UNFOLDED, head)))


def in_notebook() -> bool:
    """Whether this runs in a notebook, that is in an IPython kernel; IPython in a terminal has none."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def for_python() -> Screen:
    """The console for progress of a Python function: in a notebook its cell, else stderr, never stdout."""
    if not in_notebook():
        return Screen(stderr=True)
    if importlib.util.find_spec("ipywidgets"):
        return Screen()
    # Without ipywidgets, what a notebook shows cannot be redrawn, and rich would warn at every bar.
    return Screen(force_jupyter=False, force_terminal=False)


def draw_alone(downloads: bool = True) -> Callable[[], None]:
    """Turn off the progress bars of libraries, which would garble ours.

    Args:
        downloads: keep those of downloads from the hub, which end before any bar of ours begins.

    Returns:
        A function that turns them on again.
    """
    import huggingface_hub
    from transformers.utils import logging

    drew = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # this turns off the bars of huggingface_hub as well
    if downloads:
        huggingface_hub.utils.enable_progress_bars("huggingface_hub.snapshot_download")
    return logging.enable_progress_bar if drew else lambda: None


class Bars:
    """Progress as a bar per stage, redrawn in place. In a narrow terminal bar and times are left out."""

    def __init__(self, console: Screen) -> None:
        bar = [BarColumn(bar_width=24)] if console.width >= _BARS_WIDTH else []
        times = [TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn()]
        if console.width < _BARS_WIDTH - 24:
            times = []
        self._progress = Progress(
            TextColumn("{task.description}"), *bar, MofNCompleteColumn(), *times, console=console
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
            self._progress.stop()  # without a stage this would print an empty line


class Lines:
    """Progress as lines, where nothing can be redrawn: one when a stage is done, before that one a minute."""

    EVERY = 60.0  # seconds

    def __init__(self, console: Screen) -> None:
        self._console, self._title, self._done, self._steps = console, "", 0, 0
        self._started = self._printed = 0.0

    def stage(self, title: str, steps: int) -> None:
        self._title, self._done, self._steps = title, 0, steps
        self._started = self._printed = time.monotonic()

    def step(self) -> None:
        if self._done >= self._steps:
            self.stage(self._title, self._steps)
        self._done += 1
        now = time.monotonic()
        if self._done == self._steps or now - self._printed >= self.EVERY:
            self._printed, passed = now, now - self._started
            left = passed / self._done * (self._steps - self._done)
            self._console.say(
                f"{self._title}  {self._done}/{self._steps}  {_clock(passed)}  ETA {_clock(left)}"
            )

    def close(self) -> None:
        pass


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
