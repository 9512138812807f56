"""Numerics of the layer problem: find pruned weights V whose outputs are nearest to those of the weights W.

The loss is `||X (W - V)^T||^2 / T = sum over rows of (w - v)^T G (w - v)`, with X
the T inputs, G = X^T X / T the Gram matrix [C, C], R rows and C columns of W and V.
Damping is a multiple of the mean of G's diagonal. Inputs that are always zero have
`G_jj = 0` and get 1 there, so every matrix factorised here is positive definite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from llmprune.contracts import InputStats, Job

_MOST_DAMPING = 1.0
Snap = Callable[[Tensor, int], Tensor]  # a column [R] and its number -> the nearest values of its grid


def damped(gram: Tensor, damp: float) -> Tensor:
    """A damped copy of the Gram matrix: `G + damp * mean(diag G) I`, where zeros on the diagonal become 1."""
    gram = gram.clone()
    diagonal = gram.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damp * diagonal.mean()
    return gram


def inverse_factor(job: Job, damp: float) -> tuple[Tensor, float]:
    """Upper triangular U [C, C] with `U^T U = (G + damp * mean(diag G) I)^-1`, and the damping that was used.

    Where the factorisation fails, the damping is raised tenfold, up to 1.

    Raises:
        ValueError: it fails even with a damping of 1.
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
                f"the Gram matrix of {job.name} has no usable factorisation even with damping {used:g} "
                f"(asked: {damp:g}); check the calibration data for absurd inputs, or use more samples"
            )
        used = min(10 * used, _MOST_DAMPING)


class Spectrum(NamedTuple):
    """Eigendecomposition `S G S + damp I = Q diag(values) Q^T`.

    The diagonal matrix S scales G to unit diagonal.

    All float32: `scale` [C] is the diagonal of S, `matrix` [C, C] is `S G S + damp I`, `values` [C],
    `vectors` Q [C, C].
    """

    scale: Tensor
    matrix: Tensor
    values: Tensor
    vectors: Tensor


def spectrum(stats: InputStats, damp: float) -> Spectrum:
    """The spectrum of a Gram matrix, decomposed in float64, once for all matrices that share these inputs."""
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
    """The right-hand side `W ((1 - c) G + c X_dense^T X / T)` [R, C] of the layer problem: V G must equal it.

    With a correction c of 0 the wanted outputs are those of W on the pruned model's
    inputs X; with 1, those of W on the dense model's inputs X_dense, so that the
    matrix also makes up for what the matrices before it lost; values in between mix
    the two inputs. A high c overfits the calibration text when there is little of it.
    For the matrix of an expert c is 0.
    """
    gram = job.stats.gram
    if not correction or job.routed:
        return job.weight @ gram
    return job.weight @ torch.lerp(gram, job.stats.cross, correction)


def reconstruct(product: Tensor, keep: Tensor, matrix: Tensor, iterations: int, start: Tensor) -> Tensor:
    """The V, zero off the mask, that minimises `v^T A v - 2 p^T v` per row.

    With `p = A w` this is the V with the least `(w - v)^T A (w - v)`.

    Conjugate gradient for all rows at once, with A's diagonal as preconditioner (Hestenes and Stiefel 1952).

    Args:
        product: P [R, C].
        keep: the mask, bool [R, C].
        matrix: A [C, C], positive definite.
        iterations: of conjugate gradient.
        start: first V [R, C], zero off the mask.
    """
    inverse = matrix.diagonal().reciprocal()
    solution = start.clone()
    residual = (product - solution @ matrix).mul_(keep)
    direction = residual * inverse
    energy = torch.linalg.vecdot(residual, direction)
    for _ in range(iterations):
        image = (direction @ matrix).mul_(keep)
        curvature = torch.linalg.vecdot(direction, image)
        # In a row that is already solved the step would be 0 / 0; it must be 0.
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
    """SparseGPT's pass over the columns (arXiv 2301.00774): later columns compensate for pruned weights.

    Args:
        job: the matrix and its Gram matrix.
        factor: U of `inverse_factor`.
        step: columns per block; later blocks are updated once per block.
        group: columns whose mask is chosen together; divides `step`.
        choose: given the current values [R, K] of some columns and the number of the first, their keep mask
            [R, K].

    Returns: weight and keep mask, [R, C].
    """
    weight, keep = job.weight.clone(), torch.ones_like(job.weight, dtype=torch.bool)
    weight[:, job.stats.gram.diagonal() == 0] = 0

    def settle(columns: Tensor, start: int) -> Callable[[Tensor, int], Tensor]:
        kept = choose(columns.T, start)
        keep[:, start : start + kept.shape[1]] = kept
        factors = kept.T.to(weight.dtype)
        return lambda column, j: column * factors[j]

    _pass(weight, factor, step, group, settle)
    return weight.mul_(keep), keep


def round_columns(weight: Tensor, keep: Tensor, factor: Tensor, snap: Snap) -> Tensor:
    """GPTQ's pass over the columns (Frantar et al., arXiv 2210.17323), on a mask.

    Each column is rounded, and the later columns make up for it. Pruned weights stay zero: what the columns
    before would move them is made up for, too.

    Args:
        weight: [R, C].
        keep: the mask, bool [R, C].
        factor: U of `inverse_factor`.
        snap: given a column [R] and its number, the nearest values that can be stored.

    Returns: the rounded weight, [R, C].
    """
    weight, done = weight.clone(), torch.empty_like(weight)

    def settle(columns: Tensor, start: int) -> Callable[[Tensor, int], Tensor]:
        kept = keep[:, start : start + len(columns)].T.to(weight.dtype)

        def rounded(column: Tensor, j: int) -> Tensor:
            value = snap(column, start + j).mul_(kept[j])
            done[:, start + j] = value
            return value

        return rounded

    _pass(weight, factor, _COLUMNS, _COLUMNS, settle)
    return done


def descend(weight: Tensor, rounded: Tensor, keep: Tensor, matrix: Tensor, snap: Snap, passes: int) -> Tensor:
    """Coordinate descent on rounded weights (QuantEase, Behdin et al., arXiv 2309.01885), on a mask.

    Each column in turn takes the value of the grid that is nearest to the one at which
    `(w - v)^T A (w - v)` is least while all other columns stay.

    Args:
        weight: W [R, C], whose outputs are wanted.
        rounded: first V [R, C], zero off the mask.
        keep: the mask, bool [R, C].
        matrix: A [C, C], positive definite.
        snap: as for `round_columns`.
        passes: over the columns.
    """
    rounded, gradient = rounded.clone(), (weight - rounded) @ matrix
    for _ in range(passes):
        for a in range(0, weight.shape[1], _COLUMNS):
            part = slice(a, min(a + _COLUMNS, weight.shape[1]))
            kept, inside = keep[:, part].T.to(weight.dtype), matrix[part, part]
            values, slope = rounded[:, part].T.contiguous(), gradient[:, part].T.contiguous()
            moved = torch.empty_like(values)
            for j in range(len(values)):
                value = snap(values[j] + slope[j] / inside[j, j], a + j).mul_(kept[j])
                moved[j] = value - values[j]
                values[j] = value
                slope.addr_(inside[j], moved[j], alpha=-1)
            rounded[:, part] = values.T
            gradient.addmm_(moved.T, matrix[part], alpha=-1)
    return rounded


_COLUMNS = 128  # per block of `round_columns` and `descend`
# Given some columns, transposed to [K, R], and the number of the first: what a column of them becomes, by its
# values and its number among them.
Settling = Callable[[Tensor, int], Callable[[Tensor, int], Tensor]]


def _pass(weight: Tensor, factor: Tensor, step: int, group: int, settle: Settling) -> None:
    """One pass over the columns of `weight` [R, C], in place; see `sweep`."""
    for a in range(0, weight.shape[1], step):
        b = min(a + step, weight.shape[1])
        errors = _pass_block(weight[:, a:b], factor[a:b, a:b], a, group, settle)
        weight[:, b:].addmm_(errors, factor[a:b, b:], alpha=-1)


def _pass_block(weight: Tensor, factor: Tensor, start: int, group: int, settle: Settling) -> Tensor:
    """Process one block of `weight` [R, B] in place.

    Returns the errors [R, B] for the later columns to absorb.
    """
    errors = torch.empty_like(weight)
    # Transposed, so that the columns that the inner loop reads and writes are contiguous.
    columns = weight.T.contiguous()
    for g in range(0, weight.shape[1], group):
        settled = settle(columns[g : g + group], start + g)
        for j in range(g, min(g + group, weight.shape[1])):
            error = (columns[j] - settled(columns[j], j - g)) / factor[j, j]
            columns[j:].addr_(factor[j, j:], error, alpha=-1)
            errors[:, j] = error
    weight.copy_(columns.T)
    return errors


def finite(loss: float) -> float:
    """A loss for comparisons: NaN, for which every comparison is False, becomes infinite."""
    return loss if math.isfinite(loss) else math.inf
