"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774): prune column by column, let the later columns make up for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.contracts import Job, Need, Pruned, Pruner


class SparseGPT(Pruner):
    """One pass over the columns in blocks, with the upper Cholesky factor U of the inverse damped Gram matrix.

    Unstructured masks share a block's budget over all rows of the block together (scope `matrix`, as published).
    """

    needs = Need.GRAM
    scope = "matrix"

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`damp`: added to the Gram diagonal, relative to its mean. `block`: columns per block."""

        damp: float = 0.01
        block: int = 128

        def __post_init__(self) -> None:
            if not self.damp > 0:
                raise ValueError(f"damp must be above 0, got {self.damp}")
            if self.block < 1:
                raise ValueError(f"block must be at least 1, got {self.block}")

    def prune(self, job: Job) -> Pruned:
        weight = job.weight.clone()
        factor = self._factor(job, weight)
        keep = torch.ones_like(weight, dtype=torch.bool)
        width = job.pattern.width
        step = max(width, self.config.block // width * width)  # a group of m columns is never cut
        for a in range(0, weight.shape[1], step):
            b = min(a + step, weight.shape[1])
            errors = self._block(job, weight[:, a:b], keep[:, a:b], factor[a:b, a:b], a)
            weight[:, b:].addmm_(errors, factor[a:b, b:], alpha=-1)
        return Pruned(weight.mul_(keep), keep, job.weight.square() / factor.diagonal().square())

    def _factor(self, job: Job, weight: Tensor) -> Tensor:
        """Upper triangular U with U^T U = (G + damp * mean(diag G) I)^-1, [C, C]; dead columns of `weight` become zero."""
        gram = job.stats.gram.clone()
        diagonal = gram.diagonal()
        dead = diagonal == 0
        diagonal[dead] = 1
        weight[:, dead] = 0
        diagonal += self.config.damp * diagonal.mean()
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(gram)
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
        if failed or not bool(factor.isfinite().all()):
            raise ValueError(
                f"the Gram matrix of {job.name} is too close to singular for damp={self.config.damp}; "
                f"raise it, for example --set pruner.damp={self.config.damp * 10:g}, or use more calibration samples"
            )
        return factor

    def _block(self, job: Job, weight: Tensor, keep: Tensor, factor: Tensor, start: int) -> Tensor:
        """Prune one block in place (weight, keep: [R, B]); returns the errors [R, B] to spread over later columns."""
        errors = torch.empty_like(weight)
        scale = factor.diagonal().square()
        width = job.pattern.width if job.pattern.width > 1 else weight.shape[1]
        # Column-major work buffer: the inner loop reads and writes whole columns.
        columns = weight.T.contiguous()
        for g in range(0, weight.shape[1], width):
            group = slice(g, g + width)
            keep[:, group] = job.pattern.select(columns[group].T.square() / scale[group], job.sparsity, start + g)
            dropped = (~keep[:, group]).T.to(weight.dtype)
            for j in range(g, min(g + width, weight.shape[1])):
                error = columns[j] * dropped[j - g] / factor[j, j]
                columns[j:].addr_(factor[j, j:], error, alpha=-1)
                errors[:, j] = error
        weight.copy_(columns.T)
        return errors
