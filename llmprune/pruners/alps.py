"""ALPS (Meng et al., arXiv 2406.07831): ADMM on the layer
problem finds mask and weights together, then they are polished.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.contracts import Job, Need, Pruned, Pruner
from llmprune.numerics.gram import Spectrum, aim, reconstruct, spectrum

_USUAL = 60  # iterations it usually takes, measured at 50 to 80 % sparsity; for the estimate of time
_CHECK = 3  # every so many iterations it is checked how much the mask still changes
# (share, factor): if at least this share of the kept weights
# changed since the last check, rho grows by the factor.
_RAISE = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))


class ALPS(Pruner):
    """ADMM with the Gram matrix scaled to unit diagonal; the mask keeps the largest entries of `W + V / rho`.

    Here V is the dual variable and rho the penalty. It ends when the mask (the paper's support) is the same
    at two checks in a row. Conjugate gradient then solves for the kept weights.
    """

    scope = "matrix"
    copies, gram_copies = 8, 12  # the eigendecomposition works in float64 on several copies
    visits, decompositions = 30 * _USUAL, 1

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of ALPS.

        Attributes:
            damp: added to the unit diagonal.
            correction: in [0, 1], how far the wanted outputs are those on the dense model's inputs (0 in the
                paper); see `aim`.
            rho: first penalty.
            max_iterations: most iterations of ADMM.
            polish: iterations of conjugate gradient afterwards.
        """

        damp: float = 0.01
        correction: float = 0.0
        rho: float = 0.1
        max_iterations: int = 300
        polish: int = 30

        def __post_init__(self) -> None:
            for name in ("damp", "rho"):
                if not getattr(self, name) > 0:
                    raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
            for name, least in (("max_iterations", _CHECK), ("polish", 0)):
                if getattr(self, name) < least:
                    raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
            if not 0 <= self.correction <= 1:
                raise ValueError(f"correction must be in [0, 1], got {self.correction}")

    @property
    def needs(self) -> Need:  # type: ignore[override]
        return Need.GRAM | (Need.CROSS if self.config.correction else Need.NONE)

    @property
    def products(self) -> float:  # type: ignore[override]
        return 2 * min(_USUAL, self.config.max_iterations) + self.config.polish  # type: ignore[no-any-return]

    def prune(self, job: Job) -> Pruned:
        space = spectrum(job.stats, self.config.damp)
        dense = job.weight / space.scale
        dense[:, job.stats.gram.diagonal() == 0] = 0  # weights of inputs that are always zero: pruned first
        target = (aim(job, self.config.correction) * space.scale).add_(dense, alpha=self.config.damp)
        weight, keep, score, iterations = self._admm(job, dense, target, space)
        weight = reconstruct(target, keep, space.matrix, self.config.polish, weight)
        return Pruned(weight * space.scale, keep, score, {"damp": self.config.damp, "iterations": iterations})

    def _admm(
        self, job: Job, dense: Tensor, target: Tensor, space: Spectrum
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """ADMM in scaled coordinates: pruned weights, mask, score (all [R, C]), and number of iterations."""
        keep = job.pattern.select(dense.abs(), job.sparsity)
        weight, dual, rho, before = dense * keep, torch.zeros_like(dense), self.config.rho, keep
        kept = max(1, int(keep.sum()))
        score = dense.abs()
        iteration = 0
        while iteration < self.config.max_iterations:
            iteration += 1
            free = target.add(weight, alpha=rho).sub_(dual) @ space.vectors
            free = free.div_(space.values + rho) @ space.vectors.T
            shifted = free.add(dual, alpha=1 / rho)
            score = shifted.abs()
            keep = job.pattern.select(score, job.sparsity)
            weight = shifted * keep
            dual.add_(free.sub_(weight), alpha=rho)
            if iteration % _CHECK == 0:
                changed = int((keep ^ before).sum()) / 2
                if changed < 1:
                    break
                rho *= next(factor for share, factor in _RAISE if changed >= share * kept)
                before = keep
        return weight, keep, score, iteration
