"""What a sweep will need: seconds, disk and memory, from the plans of its cells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from llmprune.contracts import CalibrationSet
from llmprune.evaluation.scores import EvaluationSpec
from llmprune.model.opening import Model
from llmprune.planning import needs
from llmprune.planning.disk import record_bytes, with_output
from llmprune.planning.estimate import with_times
from llmprune.planning.grid import Cell
from llmprune.planning.plan import Plan, Resources, make_plan, with_scoring

KEEPS = ("none", "best", "all")


class Kept(NamedTuple):
    """Whose weights a sweep keeps: of `none`, of the `best` cell of every amount, or of `all`; and how."""

    weights: str
    packed: bool = False


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep will need.

    Attributes:
        plans: of its cells, by name.
        scoring_seconds: of scoring one model; None where there is no estimate.
        disk: bytes.
    """

    plans: Mapping[str, Plan]
    scoring_seconds: float | None
    disk: int

    def seconds(self, names: Iterable[str], dense: bool) -> float:
        """Estimated seconds of some cells, and of scoring the dense model if that is still to be done.

        What the cells share is counted for each of them, so it takes less.
        """
        chosen = list(names)
        pruning = sum(self.plans[name].pruning_seconds or 0.0 for name in chosen)
        return pruning + (self.scoring_seconds or 0.0) * (len(chosen) + dense)

    @property
    def memory(self) -> int:
        """Peak bytes of the largest cell, pruned or scored."""
        return max(max(plan.memory, plan.scoring) for plan in self.plans.values())


def plan_cells(
    cells: Sequence[Cell],
    rows: Mapping[str, CalibrationSet],
    model: Model,
    evaluation: EvaluationSpec,
    resources: Resources,
    kept: Kept,
) -> SweepPlan:
    """Plan every cell of a sweep, before any work.

    Args:
        rows: the calibration rows, by the name of the cell.
        kept: what stays of the cells.

    Raises:
        ValueError: a cell cannot be planned; the message names it.
    """
    plans: dict[str, Plan] = {}
    for cell in cells:
        samples, length = rows[cell.name].tokens.shape
        try:
            plan = make_plan(cell.recipe, model.skeleton, samples, length, resources)
            plan = with_output(plan, model, (cell.recipe.bits or 16) if kept.packed else None)
        except ValueError as error:
            raise ValueError(f"cell {cell.name}: {error}") from None
        plans[cell.name] = with_times(plan, cell.recipe, model, None, 1)
    texts = [(len(windows), windows.shape[1]) for windows in evaluation.rows.values()]
    first = with_scoring(plans[cells[0].name], model.skeleton, texts, bool(evaluation.tasks))
    timed = with_times(first, cells[0].recipe, model, evaluation, 1)
    seconds = None if timed.scoring_seconds is None else timed.scoring_seconds / 2  # of dense and pruned
    plans = {name: replace(plan, scoring=first.scoring) for name, plan in plans.items()}
    return SweepPlan(plans, seconds, _disk(cells, plans, kept.weights))


def _disk(cells: Sequence[Cell], plans: Mapping[str, Plan], keep: str) -> int:
    """Bytes: of what is kept in the end, and of the cell that is being made."""
    sizes = {name: plan.disk for name, plan in plans.items()}
    if keep == "all":
        return sum(sizes.values())
    largest: dict[str, int] = {}
    if keep == "best":
        for cell in cells:
            largest[cell.amount] = max(largest.get(cell.amount, 0), sizes[cell.name])
    records = sum(record_bytes(len(plan.matrices)) for plan in plans.values())  # which stay in any case
    return sum(largest.values()) + max(sizes.values()) + records


def uses_dense(cell: Cell) -> bool:
    """Whether a cell needs inputs in the dense model that it can share with other cells."""
    return needs.needs_dense(cell.recipe) and not cell.recipe.permute


def dense_bytes(rows: CalibrationSet, model: Model) -> int:
    """Bytes of what all blocks of the dense model put out."""
    samples, length = rows.tokens.shape
    return needs.activation_bytes(model.skeleton, samples, length) * len(model.skeleton.blocks)
