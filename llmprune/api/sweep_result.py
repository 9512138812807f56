"""What `sweep` returns: a `SweepResult`, or a `SweepDryRun`. Each prints as a few lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprune.api.notebook import data_frame, html_table
from llmprune.common.messages import duration, size_text
from llmprune.planning.cells import SweepPlan
from llmprune.planning.grid import Cell
from llmprune.record.sweep_table import figures_of, markdown, tables_of
from llmprune.record.sweeps import FAILED


@dataclass(frozen=True, repr=False)
class SweepResult:
    """A sweep that has come to its end. Printed, it is its tables.

    Attributes:
        output: the output folder.
        record: the record of the sweep, as in `sweep.json` of that folder.
    """

    output: Path
    record: dict[str, Any]

    @property
    def cells(self) -> list[dict[str, Any]]:
        """The entries of the cells: name, method, amount, status, scores, bytes, seconds, folder."""
        return list(self.record["cells"])

    @property
    def failed(self) -> dict[str, str]:
        """The error of every cell that failed, by its name."""
        return {cell["name"]: cell["error"] for cell in self.cells if cell["status"] == FAILED}

    def __repr__(self) -> str:
        return markdown(self.record)

    def _repr_html_(self) -> str:
        """The tables, in a notebook."""
        return "".join(
            html_table(f"{table.title} ({table.note})", table.marked("{} *".format), ("", *table.methods))
            for table in tables_of(self.record)
        )

    def to_pandas(self) -> Any:
        """A row for the dense model and for every cell, a column per figure, as a `pandas.DataFrame`.

        Raises:
            ValueError: pandas is not installed.
        """
        return data_frame(figures_of(self.record))


@dataclass(frozen=True, repr=False)
class SweepDryRun:
    """What a sweep would do. Printed, it is a summary of the plan.

    Attributes:
        output: the folder that the sweep would write.
        plan: of its cells.
        cells: of the grid, with their recipes.
        left: the names of those that are still to be run.
        left_out: how many combinations have the recipe of another one.
        keep: whose weights are kept.
    """

    output: Path
    plan: SweepPlan
    cells: Sequence[Cell]
    left: Sequence[str]
    left_out: int
    keep: str

    @property
    def seconds(self) -> float:
        """Estimated seconds of what is left; what the cells share is counted for each, so it takes less."""
        return self.plan.seconds(self.left, len(self.left) == len(self.cells))

    def lines(self) -> list[str]:
        """The plan in sentences."""
        done = len(self.cells) - len(self.left)
        methods = list(dict.fromkeys(cell.method for cell in self.cells))
        count = f"{len(self.cells)} cell{'s' if len(self.cells) > 1 else ''}"
        said = [f"{count}: {', '.join(methods)}" + (f"; {done} finished" if done else "")]
        if self.left_out:
            said.append(
                f"{self.left_out} more combinations have the recipe of one of these and are left out (values "
                "given twice, or an N:M pattern, which sets its own sparsity)"
            )
        if self.left:
            disk = f"{size_text(self.plan.disk)} of disk (--keep {self.keep})"
            said.append(f"at most about {duration(self.seconds)} by estimate, {disk}, {self._memory()}")
        return said

    def _memory(self) -> str:
        available = next(iter(self.plan.plans.values())).available
        needed = f"{size_text(self.plan.memory)} of memory at the peak, {size_text(available)} are free"
        return needed if self.plan.memory <= available else f"{needed}: THIS MAY NOT FIT, use fewer --samples"

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Name, time, disk and methods of every cell, in words."""
        return [
            (
                cell.name,
                "finished" if cell.name not in self.left else duration(self._seconds_of(cell)),
                size_text(self.plan.plans[cell.name].disk),
                f"{' + '.join(cell.recipe.methods)}, {cell.recipe.pattern}, {cell.recipe.sparsity:g}",
            )
            for cell in self.cells
        ]

    def _seconds_of(self, cell: Cell) -> float:
        return self.plan.seconds([cell.name], False)

    def summary(self) -> dict[str, Any]:
        """Plain values, for `--dry-run --json`."""
        return {
            "output": str(self.output),
            "cells": [
                {
                    "name": cell.name,
                    "method": cell.method,
                    "amount": cell.amount,
                    "recipe": cell.recipe.as_dict(),
                    "left": cell.name in self.left,
                    "seconds": self._seconds_of(cell),
                    "disk_bytes": self.plan.plans[cell.name].disk,
                    "memory_bytes": self.plan.plans[cell.name].memory,
                }
                for cell in self.cells
            ],
            "combinations_left_out": self.left_out,
            "keep": self.keep,
            "seconds": self.seconds,
            "disk_bytes": self.plan.disk,
            "memory_bytes": self.plan.memory,
        }

    def __repr__(self) -> str:
        return "\n".join(["Plan, nothing was written", *(f"  {line}" for line in self.lines())])
