"""Least squares on a fixed mask: the kept weights that best
reproduce the layer's outputs, all rows solved together.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmprune.contracts import Job, Need, Pruned, Step
from llmprune.numerics.gram import aim, damped, reconstruct


class LeastSquares(Step):
    """Minimises `(w - v)^T (G + damp * mean(diag G) I) (w - v)` per row over the kept weights v.

    Works after any pruner and refiner. Conjugate gradient for all rows at once, with the diagonal as
    preconditioner (Hestenes and Stiefel 1952), starting from the current weights.
    """

    changes = "weights"
    visits = 300

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of least squares.

        Attributes:
            damp: added to the Gram diagonal, relative to its mean.
            iterations: of conjugate gradient.
            correction: in [0, 1], how far the wanted outputs are those on the dense model's inputs; see
                `aim`.
        """

        damp: float = 0.01
        iterations: int = 30
        correction: float = 0.0

        def __post_init__(self) -> None:
            if not self.damp > 0:
                raise ValueError(f"damp must be above 0, got {self.damp}")
            if self.iterations < 1:
                raise ValueError(f"iterations must be at least 1, got {self.iterations}")
            if not 0 <= self.correction <= 1:
                raise ValueError(f"correction must be in [0, 1], got {self.correction}")

    @property
    def needs(self) -> Need:  # type: ignore[override]
        return Need.GRAM | (Need.CROSS if self.config.correction else Need.NONE)

    @property
    def products(self) -> float:  # type: ignore[override]
        return self.config.iterations + 1  # type: ignore[no-any-return]

    def apply(self, job: Job, pruned: Pruned) -> Pruned:
        matrix = damped(job.stats.gram, self.config.damp)
        added = matrix.diagonal() - job.stats.gram.diagonal()  # what damping added
        product = aim(job, self.config.correction) + job.weight * added
        weight = reconstruct(product, pruned.keep, matrix, self.config.iterations, pruned.weight)
        return Pruned(weight, pruned.keep, pruned.score, {**pruned.notes, "damp": self.config.damp})
