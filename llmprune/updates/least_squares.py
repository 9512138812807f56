"""Least squares on a fixed mask: the kept weights that best reproduce the layer's outputs, all rows solved together."""

from __future__ import annotations

from dataclasses import dataclass

from llmprune.contracts import Job, Need, Pruned, Step
from llmprune.numerics import damped, reconstruct


class LeastSquares(Step):
    """Minimises `(w - v)^T (G + damp * mean(diag G) I) (w - v)` per row over v on the mask; works after any pruner and refiner.

    Batched conjugate gradient with the diagonal as preconditioner (Hestenes and Stiefel 1952), starting from the weights as they are.
    """

    needs = Need.GRAM
    changes = "weights"

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`damp`: added to the Gram diagonal, relative to its mean. `iterations` of conjugate gradient."""

        damp: float = 0.01
        iterations: int = 30

        def __post_init__(self) -> None:
            if not self.damp > 0:
                raise ValueError(f"damp must be above 0, got {self.damp}")
            if self.iterations < 1:
                raise ValueError(f"iterations must be at least 1, got {self.iterations}")

    def apply(self, job: Job, pruned: Pruned) -> Pruned:
        matrix = damped(job.stats.gram, self.config.damp)
        weight = reconstruct(job.weight, pruned.keep, matrix, self.config.iterations, pruned.weight)
        return Pruned(weight, pruned.keep, pruned.score, {**pruned.notes, "damp": self.config.damp})
