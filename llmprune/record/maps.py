"""The sections of the report on matrices: maps of sparsity and error, their table, and the allocation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from llmprune.pages.charts import Point, lines
from llmprune.pages.document import Markup, Section, abreast, element, paragraph
from llmprune.pages.tables import Bar, Cell, bars, breakable, heat, table
from llmprune.record.grouping import Grid, Group, grid_of

Record = Mapping[str, Any]
_ERROR = (
    "Relative error: of a matrix's outputs on calibration inputs, the squared change over the squared "
    "outputs of the dense matrix."
)
_TUNED = (
    "In brackets: the same of the whole block's outputs on calibration rows held out from its tuning, before "
    "and after it."
)


def sections(record: Record) -> list[Section]:
    """The section on matrices, and one on the allocation where it was searched or differs by block."""
    grid = grid_of(record["matrices"])
    found = [Section("Matrices", _matrices(record, grid))]
    shared_out = _allocation(record, grid)
    return [*found, Section("Allocation", shared_out)] if shared_out else found


def _matrices(record: Record, grid: Grid) -> Markup:
    measured = any(group.errors for group in grid.groups.values())
    maps = [_map(grid, "sparsity", "Sparsity", ".4f")] if _differ(grid) else []
    if measured:
        maps.append(_map(grid, "error", "Relative error of the outputs", "#.2g"))
    notes = [] if _differ(grid) else [f"Every matrix has a sparsity of {_first(grid).sparsity:.4f}."]
    notes += [_ERROR] if measured else []
    notes += [_TUNED] if any("tune" in row for row in record["matrices"]) else []
    if grid.largest > 1:
        notes.append(
            f"A block has up to {grid.largest} matrices of a kind, one of each expert: their sparsity is "
            "taken together, and of their errors the mean is shown; llmprune.json has every matrix."
        )
    told = paragraph(" ".join(notes)) if notes else Markup("")
    return told + (abreast(maps, "maps") if maps else "") + _table(grid, measured)


def _first(grid: Grid) -> Group:
    return next(iter(grid.groups.values()))


def _differ(grid: Grid) -> bool:
    """Whether the sparsities differ in what is shown of them."""
    return len({f"{group.sparsity:.4f}" for group in grid.groups.values()}) > 1


def _map(grid: Grid, what: str, caption: str, form: str) -> Markup:
    """A heat map of one figure of the groups; its cells say the other one, too."""
    found = [[grid.groups.get((block, kind)) for kind in grid.kinds] for block in grid.blocks]
    values = [[None if group is None else getattr(group, what) for group in row] for row in found]
    notes = [["" if group is None else _said(group) for group in row] for row in found]
    return heat(grid.blocks, ["block", *grid.kinds], values, caption, form=form, notes=notes)


def _said(group: Group) -> str:
    """A group in words, for the tip of its cell."""
    parts = [f"sparsity {group.sparsity:.4f}"]
    errors, count = group.errors, len(group.matrices)
    if group.error is not None:
        parts.append(f"relative error {group.error:.4g}")
    if count > 1:
        ends = f" (errors {min(errors):.3g} to {max(errors):.3g})" if errors else ""
        parts.append(f"{count} experts{ends}")
        if errors and len(errors) < count:
            parts.append(f"{count - len(errors)} that no token reached")
    return ", ".join(parts)


def _table(grid: Grid, measured: bool) -> Markup:
    """All groups, a row each; columns that say the same of every matrix are told in the caption."""
    groups = list(grid.groups.values())
    columns: dict[str, list[object]] = {
        "matrix": [breakable(group.name) for group in groups],
        "shape": [_shape(group) for group in groups],
    }
    if grid.largest > 1:
        columns["experts"] = [
            len(group.matrices) if len(group.matrices) > 1 else Cell("-", None) for group in groups
        ]
    columns["pattern"] = [_together(row["pattern"] for row in group.matrices) for group in groups]
    columns["sparsity"] = [Cell(f"{group.sparsity:.4f}", group.sparsity) for group in groups]
    if measured:
        columns["relative error"] = [
            Cell("-" if group.error is None else f"{group.error:.4f}", group.error) for group in groups
        ]
    columns["steps"] = [_together(map(steps_of, group.matrices)) for group in groups]
    same = [name for name in ("pattern", "steps") if len(set(map(str, columns[name]))) == 1]
    told = "".join(f"; {columns.pop(name)[0]}" for name in same)
    of = "matrices" if grid.largest == 1 else "kinds of matrices in a block"
    made = table(tuple(columns), list(zip(*columns.values(), strict=True)), f"{len(groups)} {of}{told}", True)
    return element("div", made, class_="scroll")


def _shape(group: Group) -> Cell:
    rows, columns = group.matrices[0]["shape"]
    return Cell(f"{rows} x {columns}", rows * columns)


def _together(words: Any) -> str:
    """What is said of several matrices, each thing once."""
    return ", ".join(dict.fromkeys(map(str, words)))


def steps_of(matrix: Record) -> str:
    """The steps a matrix went through; after tuning also the block's held-out error before and after it."""
    steps = " + ".join([matrix["pruner"], *matrix["steps"]])
    tune = matrix.get("tune")
    if not tune:
        return steps
    if not tune["applied"]:
        return f"{steps} (no gain, not applied)"
    return f"{steps} ({tune['held_out_before']:.3g} to {tune['held_out_after']:.3g})"


def _allocation(record: Record, grid: Grid) -> Markup:
    """What the allocator measured, and the sparsity it gave to each block; empty where neither is of note."""
    name = record["recipe"].get("allocator", {"name": "uniform"})["name"]
    parts = [
        _measured(f"{name}: {what}", measured) for what, measured in record.get("allocation", {}).items()
    ]
    by_block = _by_block(grid)
    if len({f"{point.y:.4f}" for point in by_block}) > 1:
        axes = ("block", "sparsity")
        parts.append(lines({"sparsity": by_block}, axes, "Sparsity by block, all its matrices together"))
    return abreast(parts) if parts else Markup("")


def _measured(caption: str, measured: Mapping[str, Any]) -> Markup:
    """What was measured by block as a line, of several numbers for each matrix the middle one; by trial as
    bars.
    """
    if len(measured) > 1 and all(name.startswith("block ") for name in measured):
        levels = [(number, _level(value)) for number, value in enumerate(measured.values())]
        points = [Point(number, level) for number, level in levels if level is not None]
        if any(isinstance(value, Mapping) for value in measured.values()):
            caption += ", the middle one of each matrix, averaged"
        return lines({caption: points}, ("block", "measure"), caption)
    shown = [Bar(name, value, f"{value:.4g}") for name, value in measured.items()]
    return bars(shown, caption, ("allocation", "held-out loss"))


def _level(value: float | Mapping[str, Sequence[float]]) -> float | None:
    """One number for what was measured of a block; None where that is nothing."""
    if not isinstance(value, Mapping):
        return value
    middles = [numbers[len(numbers) // 2] for numbers in value.values()]
    return fmean(middles) if middles else None


def _by_block(grid: Grid) -> Sequence[Point]:
    """The sparsity of each block that is known by a number."""
    found: dict[int, list[Record]] = {}
    for (block, _), group in grid.groups.items():
        if block.isdigit():
            found.setdefault(int(block), []).extend(group.matrices)
    return [Point(block, Group("", rows).sparsity) for block, rows in sorted(found.items())]
