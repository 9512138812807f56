"""What `prune` and `run_model` return: a `Result`, or a `DryRun`. Each prints as a few lines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprune.api.notebook import data_frame, html_table
from llmprune.common.messages import duration, size_text
from llmprune.planning.plan import Plan
from llmprune.planning.training import TrainingPlan
from llmprune.recipe.recovery import RecoveryRecipe
from llmprune.recipe.types import Recipe
from llmprune.record.figures import ScoreRow, from_dense, method_of, score_rows, share_of_all, sizes_on_disk
from llmprune.record.recovered import training_rows


@dataclass(frozen=True, repr=False)
class Result:
    """A finished run. Printed, it is a summary of the record.

    Attributes:
        output: the output folder.
        record: the record of the run, as in `llmprune.json` of that folder.
    """

    output: Path
    record: dict[str, Any]

    def __repr__(self) -> str:
        return _lines("Result", self._summary())

    def _repr_html_(self) -> str:
        """The same as a table, in a notebook."""
        return html_table("Result", self._summary())

    def to_pandas(self) -> Any:
        """A row for every matrix, as a `pandas.DataFrame`.

        Raises:
            ValueError: pandas is not installed.
        """
        return data_frame(self.record["matrices"])

    def _summary(self) -> list[tuple[str, str]]:
        record, totals = self.record, self.record["totals"]
        pruned = f"{totals['sparsity']:.2%} of {totals['weights']:,} weights in the pruned matrices"
        found = score_rows(record)
        scores = [(s.name, _scored(s, "recovery" in record and not from_dense(found))) for s in found]
        unscored = "none, trained" if "recovery" in record else "none, pruned"
        trained = [row for row in training_rows(record) if row[0] in _SHOWN] if "recovery" in record else []
        return [
            ("model", record["model"]["source"]),
            ("method", method_of(record)),
            ("sparsity", f"{pruned}, {share_of_all(record)}"),
            *trained,
            *(scores or [("scores", f"{unscored} without evaluation")]),
            ("bytes", sizes_on_disk(record)),
            ("seconds", f"{totals['seconds']['total']:.1f}"),
            ("output", str(self.output)),
        ]


_SHOWN = ("text", "tokens", "learning rate", "held-out loss", "held-out error")


def _scored(row: ScoreRow, recovered: bool) -> str:
    """The scores of a row, one after the other."""
    if not recovered:
        return f"{row.dense} dense, {row.pruned} {'trained' if row.start else 'pruned'} ({row.change})"
    gap = f", {row.gap} of the gap closed" if row.gap.endswith("%") else ""
    return f"{row.dense} dense, {row.start} start, {row.pruned} recovered ({row.change}{gap})"


@dataclass(frozen=True, repr=False)
class DryRun:
    """What a run would do. Printed, it is a summary of the plan.

    Attributes:
        plan: what will be pruned, and the memory, disk space and time it is estimated to need.
        recipe: the recipe with every default filled in.
        output: the folder that the run would write.
    """

    plan: Plan
    recipe: Recipe
    output: Path

    def __repr__(self) -> str:
        plan = self.plan
        matrices = f"{len(plan.matrices)} pruned ({plan.weights:,} weights), {len(plan.skipped)} skipped"
        rows = [
            ("recipe", f"{self.recipe.name}: {' + '.join(self.recipe.methods)}, {self.recipe.pattern}"),
            ("matrices", matrices),
            ("sparsity", f"{plan.sparsity:.4g} (target)"),
            ("calibration", f"{plan.samples} samples x {plan.sequence_length} tokens"),
            ("memory", f"about {size_text(plan.memory)} of {size_text(plan.available)} free"),
            ("disk", size_text(plan.disk)),
            ("output", str(self.output)),
        ]
        return _lines("Plan, nothing was written", rows)


@dataclass(frozen=True, repr=False)
class RecoveryDryRun:
    """What a recovery would do. Printed, it is a summary of the plan.

    Attributes:
        plan: the memory it is estimated to need, by part.
        recipe: the recipe of recovery with every default filled in.
        output: the folder that would be written.
    """

    plan: TrainingPlan
    recipe: RecoveryRecipe
    output: Path

    def __repr__(self) -> str:
        return _lines("Plan, nothing was written", self.rows())

    def rows(self) -> list[tuple[str, str]]:
        """The plan in words."""
        plan = self.plan
        return [
            ("recipe", f"{self.recipe.name}: {self.recipe.description}"),
            ("trained", f"{plan.trained:,} numbers for {plan.weights:,} weights of matrices"),
            ("steps", f"{plan.steps:,}, {plan.tokens:,} tokens: about {duration(plan.seconds)}"),
            (
                "memory",
                f"about {size_text(plan.memory)} of {size_text(plan.available)} free, "
                f"{plan.per_weight:.1f} bytes per weight",
            ),
            *((f"  {name}", size_text(count)) for name, count in plan.parts.items() if count),
            ("output", str(self.output)),
        ]


def _lines(title: str, rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in rows)])


def plan_summary(dry: DryRun | RecoveryDryRun) -> dict[str, Any]:
    """A dry run as plain values, for `--dry-run --json`."""
    return _training_summary(dry) if isinstance(dry, RecoveryDryRun) else _pruning_summary(dry)


def _training_summary(dry: RecoveryDryRun) -> dict[str, Any]:
    plan = dry.plan
    return {
        "output": str(dry.output),
        "recipe": dry.recipe.as_dict(),
        "weights": plan.weights,
        "trained": plan.trained,
        "steps": plan.steps,
        "tokens": plan.tokens,
        "seconds": round(plan.seconds, 1),
        "memory_bytes": plan.memory,
        "memory_bytes_by_part": plan.parts,
        "memory_bytes_per_weight": plan.per_weight,
        "available_memory_bytes": plan.available,
    }


def _pruning_summary(dry: DryRun) -> dict[str, Any]:
    plan = dry.plan
    matrices = [
        {
            "name": m.name,
            "shape": list(m.shape),
            "pattern": str(m.pattern),
            "sparsity": m.sparsity,
            "set_by": m.reason,
        }
        for m in plan.matrices.values()
    ]
    return {
        "output": str(dry.output),
        "recipe": dry.recipe.as_dict(),
        "matrices": matrices,
        "skipped": list(plan.skipped),
        "dense": list(plan.dense),
        "weights": plan.weights,
        "sparsity": plan.sparsity,
        "memory_bytes": plan.memory,
        "device_memory_bytes": plan.device_memory,
        "scoring_memory_bytes": plan.scoring,
        "device_scoring_memory_bytes": plan.device_scoring,
        "available_memory_bytes": plan.available,
        "offload": plan.offload,
        "disk_bytes": plan.disk,
        "pruning_seconds": plan.pruning_seconds,
        "scoring_seconds": plan.scoring_seconds,
        "tasks_counted": plan.tasks_counted,
        "remarks": list(plan.remarks),
    }
