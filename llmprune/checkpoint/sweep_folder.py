"""The folder of a sweep: its record, tables and plot, and in `cells/` an output folder for each cell."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmprune.checkpoint import replacement
from llmprune.checkpoint.contents import INDEX, JOURNAL, RECORD, SCHEMA, SWEEP, SWEEP_MADE, TEMPORARY
from llmprune.checkpoint.files import write_durably
from llmprune.checkpoint.journal import Journal
from llmprune.checkpoint.lock import Lock
from llmprune.common.messages import shown

CELLS = "cells"
_NAME = re.compile(r"[A-Za-z0-9_=+-][A-Za-z0-9._=+-]*")


class SweepFolder:
    """Opens the folder of a sweep, for this process alone.

    Without `resume`, `restart` and `overwrite` it must not hold a sweep yet. Only what a sweep has written is
    ever removed.

    Args:
        output: the folder, as the user named it.
        overwrite: replace a finished sweep: every old cell once the new sweep is finished, or once the new
            cell of the same name is.
        resume: go on with the sweep that is there.
        restart: throw an unfinished sweep away.
        inputs: what the sweep reads, which must not be overwritten.

    Attributes:
        found: the record of the sweep that is to go on; None for a new one.
        old: the names of the cells of a finished sweep that is to be replaced.

    Raises:
        ValueError: the folder cannot be used, or another process writes it.
    """

    def __init__(
        self,
        output: Path,
        *,
        overwrite: bool = False,
        resume: bool = False,
        restart: bool = False,
        inputs: replacement.Inputs = (),
    ) -> None:
        self.output, self._given = output.resolve(), output
        self._lock: Lock | None = None
        there = check_sweep(output, overwrite, resume, restart, inputs)
        self.found = there if resume else None
        waiting = list(there.get("replaces", [])) if there else []
        self.old: list[str] = waiting if resume or there is None else [*_cells_of(there), *waiting]
        self._restart = there is not None and not resume and not there["finished"]
        self._there = there

    def begin(self) -> None:
        """Take the folder: from here on it is written.

        Raises:
            ValueError: another process writes it, or has written it since it was opened.
        """
        self._lock = Lock(self.output.with_name(f".{self.output.name}.lock"), f"output {self._given}")
        if read_sweep(self.output) != self._there:
            raise ValueError(
                f"another sweep has gone on in {self._given} meanwhile; give the same command again"
            )
        if self._restart:
            for name in self.old:
                self.remove(name)
            self.old = []
        (self.output / CELLS).mkdir(parents=True, exist_ok=True)

    def cell(self, name: str) -> Path:
        """The output folder of a cell."""
        return self.output / CELLS / name

    def holds_weights(self, name: str) -> bool:
        """Whether the weights of a finished cell are there."""
        return (self.cell(name) / INDEX).is_file() and (self.cell(name) / RECORD).is_file()

    def write(self, files: Mapping[str, bytes]) -> None:
        """Write files of the sweep's own by name, each completely or not at all."""
        assert set(files) <= set(SWEEP_MADE)
        for name, content in files.items():
            write_durably(self.output / name, [content])

    def spent(self, name: str) -> bool:
        """Whether there is what a finished cell leaves without its weights."""
        return (self.cell(name) / RECORD).is_file() and not self.holds_weights(name)

    def strip(self, name: str) -> None:
        """Remove the weights of a finished cell; its record and its report stay."""
        if (self.cell(name) / RECORD).is_file():  # an index may be gone: an interrupted strip begins with it
            replacement.strip(self.cell(name))

    def remove(self, name: str) -> None:
        """Remove a cell of a sweep, finished or not; files that no run has written stay."""
        beside = self.cell(name).with_name
        # First what a killed move has left: the journal that explains it lies in one of the others.
        for folder, unfinished in (
            (beside(f".{name}.replaced"), False),
            (self.cell(name), False),
            (beside(f".{name}.partial"), True),
        ):
            if folder.is_dir() and not folder.is_symlink():
                replacement.remove(folder, unfinished)

    def blocks_done(self, name: str) -> int:
        """How many blocks an unfinished cell has finished, by its journal."""
        path = self.cell(name).with_name(f".{name}.partial") / JOURNAL
        return len(Journal(path).blocks) if path.is_file() else 0

    def close(self) -> None:
        """Release the folder; one in which nothing was written is removed."""
        if self._lock is None:
            return
        for folder in (self.output / CELLS, self.output):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        self._lock.release()
        self._lock = None


def check_sweep(
    output: Path, overwrite: bool, resume: bool, restart: bool, inputs: replacement.Inputs
) -> dict[str, Any] | None:
    """The record of the sweep in a folder; None where there is none.

    Raises:
        ValueError: the folder cannot be used with these options.
    """
    if resume and restart:
        raise ValueError(
            "resume continues an unfinished sweep and restart throws it away; give one of the two"
        )
    replacement.check_target(output, inputs)
    if not output.is_dir() or not any(output.iterdir()):
        return None
    found = read_sweep(output)
    if found is None:
        raise ValueError(
            f"output folder {output} is not empty and holds no sweep; choose another with --output"
        )
    finished = found["finished"]
    if resume and overwrite and finished:
        raise ValueError(
            f"output folder {output} holds a finished sweep: resume keeps its cells and overwrite replaces "
            "them; give one of the two"
        )
    if resume:
        return found
    if not (overwrite if finished else restart):
        way = "continue it with --resume or " + (
            "replace it with --overwrite" if finished else "throw it away with --restart"
        )
        state = "a finished" if finished else "an unfinished"
        raise ValueError(f"output folder {output} holds {state} sweep; {way}")
    foreign = _foreign(output, [*_cells_of(found), *found.get("replaces", [])])
    if foreign:
        raise ValueError(
            f"output folder {output} holds {shown(foreign)}, which no sweep has written, so it is not "
            "replaced; choose another --output, or move that away first"
        )
    return found


def read_sweep(folder: Path) -> dict[str, Any] | None:
    """The record of the sweep in a folder; None where there is none.

    Raises:
        ValueError: the record is damaged.
    """
    path = folder / SWEEP
    if not path.is_file() or path.is_symlink():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        assert record["schema"] == SCHEMA and isinstance(record["finished"], bool)
        names = [*_cells_of(record), *record.get("replaces", [])]
        assert all(isinstance(name, str) and _NAME.fullmatch(name) for name in names)
    except (OSError, ValueError, LookupError, TypeError, AssertionError, RecursionError):
        raise ValueError(
            f"{path} is no record of a sweep that this version reads; move the folder away, or choose "
            "another --output"
        ) from None
    return dict(record)


def _cells_of(record: Mapping[str, Any]) -> list[str]:
    return [cell["name"] for cell in record["cells"]]


def _foreign(output: Path, cells: list[str]) -> str | None:
    """The name of something in a sweep's folder that the sweep has not put there."""
    for entry in sorted(os.scandir(output), key=lambda entry: entry.name):
        if entry.name != CELLS and entry.name.removesuffix(TEMPORARY) not in SWEEP_MADE:
            return entry.name
    folder = output / CELLS
    beside = {form.format(n) for n in cells for form in ("{}", ".{}.partial", ".{}.lock", ".{}.replaced")}
    inside = sorted(os.listdir(folder)) if folder.is_dir() and not folder.is_symlink() else []
    return next((f"{CELLS}/{name}" for name in inside if name not in beside), None)
