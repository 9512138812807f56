"""Numerics of the layer problem `||X (W - V)^T||^2 / T = sum over rows of (w - v)^T G (w - v)` that several algorithms share.

R rows, C columns, G the Gram matrix [C, C]. Damping is relative to the mean of G's diagonal; where a factorisation fails it is raised
tenfold, and the caller is told what it took. Dead inputs (`G_jj = 0`) get a unit diagonal, so every matrix here is definite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from llmprune.contracts import InputStats, Job

_MOST_DAMPING = 1.0


def damped(gram: Tensor, damp: float) -> Tensor:
    """`G + damp * mean(diag G) I`, dead inputs with 1 on the diagonal first; a copy."""
    gram = gram.clone()
    diagonal = gram.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damp * diagonal.mean()
    return gram


def inverse_factor(job: Job, damp: float) -> tuple[Tensor, float]:
    """Upper triangular U with `U^T U = (G + damp * mean(diag G) I)^-1`, [C, C], and the damping it took.

    Raises:
        ValueError: even a damping of 1 does not make the factorisation succeed.
    """
    return job.stats.derived(("inverse factor", damp), lambda: _inverse_factor(job, damp))


def _inverse_factor(job: Job, damp: float) -> tuple[Tensor, float]:
    used = damp
    while True:
        factor, failed = torch.linalg.cholesky_ex(damped(job.stats.gram, used))
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
        if not failed and bool(factor.isfinite().all()):
            return factor, used
        if used >= _MOST_DAMPING:
            raise ValueError(
                f"the Gram matrix of {job.name} has no usable factorisation even with damping {used:g} (asked: {damp:g}); "
                "check the calibration data for absurd inputs, or use more samples"
            )
        used = min(10 * used, _MOST_DAMPING)


class Spectrum(NamedTuple):
    """`S G S + damp I = Q diag(values) Q^T` with S the scaling to unit diagonal: scale [C], values [C], vectors Q [C, C], float32."""

    scale: Tensor
    matrix: Tensor
    values: Tensor
    vectors: Tensor


def spectrum(stats: InputStats, damp: float) -> Spectrum:
    """Eigendecomposition, in float64, of the Gram matrix scaled to unit diagonal; once per input group."""
    return stats.derived(("spectrum", damp), lambda: _spectrum(stats.gram, damp))


def _spectrum(gram: Tensor, damp: float) -> Spectrum:
    diagonal = gram.diagonal()
    scale = torch.where(diagonal > 0, diagonal, 1).rsqrt()
    scaled = (gram * scale * scale[:, None]).double()
    scaled.diagonal()[diagonal <= 0] = 1
    scaled.diagonal().add_(damp)
    values, vectors = torch.linalg.eigh(scaled)
    return Spectrum(scale, scaled.float(), values.float(), vectors.float())


def aim(job: Job, correction: float) -> Tensor:
    """`W ((1 - c) G + c X_dense^T X / T)`, [R, C]: what V G is to equal for outputs nearest to W's.

    A correction c above 0 asks for the outputs of W on inputs this share of the way back to the dense model's, so that a matrix makes up
    for a part of what the matrices before it lost; 1 is all of it (and fits the calibration text too closely when there is little of it).
    """
    gram = job.stats.gram
    return job.weight @ (torch.lerp(gram, job.stats.cross, correction) if correction else gram)


def reconstruct(product: Tensor, keep: Tensor, matrix: Tensor, iterations: int, start: Tensor) -> Tensor:
    """The V on the mask that minimises `v^T A v - 2 p^T v` per row, by conjugate gradient with A's diagonal as preconditioner.

    With `p = A w` that is the V nearest to W, `(w - v)^T A (w - v)`.

    Args:
        product: P [R, C]. keep: [R, C]. matrix: A [C, C], positive definite. start: [R, C], zero off the mask.
    """
    inverse = matrix.diagonal().reciprocal()
    solution = start.clone()
    residual = (product - solution @ matrix).mul_(keep)
    direction = residual * inverse
    energy = torch.linalg.vecdot(residual, direction)
    for _ in range(iterations):
        image = (direction @ matrix).mul_(keep)
        curvature = torch.linalg.vecdot(direction, image)
        # A solved row has no energy left: its step is 0 / 0, and 0 is meant.
        step = torch.where(curvature > 0, energy / curvature, 0)[:, None]
        solution.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        image = torch.mul(residual, inverse, out=image)
        before, energy = energy, torch.linalg.vecdot(residual, image)
        direction.mul_(torch.where(before > 0, energy / before, 0)[:, None]).add_(image)
    return solution


def sweep(
    job: Job, factor: Tensor, step: int, group: int, choose: Callable[[Tensor, int], Tensor]
) -> tuple[Tensor, Tensor]:
    """SparseGPT's pass over the columns: what is pruned is made up for by the columns after it.

    Args:
        factor: U of `inverse_factor`. step: columns per block. group: columns whose mask is chosen together, dividing the step.
        choose: keep mask [R, K] of the current columns [R, K] that begin at a column.

    Returns: weight and mask [R, C].
    """
    weight, keep = job.weight.clone(), torch.ones_like(job.weight, dtype=torch.bool)
    weight[:, job.stats.gram.diagonal() == 0] = 0
    for a in range(0, weight.shape[1], step):
        b = min(a + step, weight.shape[1])
        errors = _sweep_block(weight[:, a:b], keep[:, a:b], factor[a:b, a:b], a, group, choose)
        weight[:, b:].addmm_(errors, factor[a:b, b:], alpha=-1)
    return weight.mul_(keep), keep


def _sweep_block(
    weight: Tensor,
    keep: Tensor,
    factor: Tensor,
    start: int,
    group: int,
    choose: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """One block in place (weight, keep: [R, B]); returns the errors [R, B] to spread over later columns."""
    errors = torch.empty_like(weight)
    # Column-major work buffer: the inner loop reads and writes whole columns.
    columns = weight.T.contiguous()
    for g in range(0, weight.shape[1], group):
        part = slice(g, g + group)
        keep[:, part] = choose(columns[part].T, start + g)
        dropped = (~keep[:, part]).T.to(weight.dtype)
        for j in range(g, min(g + group, weight.shape[1])):
            error = columns[j] * dropped[j - g] / factor[j, j]
            columns[j:].addr_(factor[j, j:], error, alpha=-1)
            errors[:, j] = error
    weight.copy_(columns.T)
    return errors


def finite(loss: float) -> float:
    """A loss to compare by: NaN, which wins and loses against nothing, counts as infinite."""
    return loss if math.isfinite(loss) else math.inf
