"""Slow, independent reference versions of training with sparsity: methods in phases, and methods that keep
more than theta and a mask. Conventions, the names of arguments and the table of functions stand in
`recovery_oracles.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from recovery_oracles import Gradient, Sparsity, Step, f64, lora_gradients, moved, per_step, top

Make = Callable[[], Any]
Score = Callable[[np.ndarray], np.ndarray]


# --- dense and compressed phases


def acdc(
    theta: np.ndarray,
    keep: np.ndarray,
    gradient: Gradient,
    rates: list[float],
    make: Make,
    sparsity: Any,
    dense: list[bool],
) -> list[Step]:
    """AC/DC (arXiv 2106.12379): step t trains all weights where dense[t], those of the mask elsewhere.

    The mask changes at the end of the step before: to all ones, pruned weights coming back as zeros without
    momentum, or to top(|theta|, sparsity[t]) of that step t. Before step 0 it is `keep`, or all ones.
    """
    everything = np.ones(keep.shape, dtype=bool)
    keep = everything if dense[0] else keep
    theta, optimizer, steps = f64(theta) * keep, make(), len(rates)
    sparsity = per_step(sparsity, steps)
    history = []
    for t in range(steps):
        theta = optimizer.step(theta, gradient(theta, t) * keep, rates[t]) * keep
        if t + 1 < steps and dense[t + 1] != dense[t]:
            new = everything if dense[t + 1] else top(np.abs(theta), sparsity[t])
            theta, keep = moved(theta, keep, new, optimizer, False), new
        history.append(Step(theta, keep, theta))
    return history


def gap(
    thetas: list[np.ndarray],
    keeps: list[np.ndarray],
    gradient: Callable[[list[np.ndarray], int], list[np.ndarray]],
    rates: list[float],
    make: Make,
    sparsities: list[Sparsity],
    parts: list[int],
    dense_part: list[int | None],
) -> list[Step]:
    """Grow and prune, S-GaP (arXiv 2106.09857), for several matrices; matrix j belongs to part parts[j].

    In step t the matrices of part dense_part[t] are dense, all others sparse (None: all sparse). Where the
    next step has another part, the old one is pruned by |theta| to sparsities[j] and the new one grows with
    zeros, at the end of the step. `gradient` takes and returns lists; each Step holds three lists.
    """
    thetas, keeps = [f64(theta) for theta in thetas], list(keeps)
    optimizers, numbers = [make() for _ in thetas], range(len(thetas))
    history = []

    def change(old: int | None, now: int | None) -> None:
        for j in numbers:
            new = keeps[j]
            if old is not None and parts[j] == old:
                new = top(np.abs(thetas[j]), sparsities[j])
            if now is not None and parts[j] == now:
                new = np.ones(keeps[j].shape, dtype=bool)
            thetas[j], keeps[j] = moved(thetas[j], keeps[j], new, optimizers[j], False), new

    change(None, dense_part[0])
    for t, rate in enumerate(rates):
        all_g = gradient(list(thetas), t)
        for j in numbers:
            thetas[j] = optimizers[j].step(thetas[j], all_g[j] * keeps[j], rate) * keeps[j]
        if t + 1 < len(rates) and dense_part[t + 1] != dense_part[t]:
            change(dense_part[t], dense_part[t + 1])
        history.append(Step(list(thetas), list(keeps), list(thetas)))
    return history


def iss_p(
    theta: np.ndarray,
    keep: np.ndarray,
    gradient: Gradient,
    rates: list[float],
    make: Make,
    sparsity: Any,
    rho: float,
    soft: int,
    mask_first: bool = False,
    forget: bool = True,
) -> list[Step]:
    """Iterative soft shrinkage (arXiv 2303.09650): for `soft` steps the forward pass and the gradient are
    dense, pruned weights are multiplied by rho after the optimizer, and the mask is top(|theta|) anew at
    the end of each step; then theta * k, and fine-tuning with that mask.

    By default the weights that shrink are those of the mask so far, as in every other method here; with
    `mask_first`, as in the paper, the new mask is chosen before, and its pruned weights shrink.
    """
    theta, optimizer, steps = f64(theta), make(), len(rates)
    sparsity = per_step(sparsity, steps)
    history = []
    for t in range(steps):
        if t < soft:
            theta = optimizer.step(theta, gradient(theta, t), rates[t])
            if mask_first:
                new = top(np.abs(theta), sparsity[t])
                theta = np.where(new, theta, rho * theta)
            else:
                theta = np.where(keep, theta, rho * theta)
                new = top(np.abs(theta), sparsity[t])
            theta, keep = moved(theta, keep, new, optimizer, True, forget=forget), new
        else:
            theta = theta * keep
            theta = optimizer.step(theta, gradient(theta, t) * keep, rates[t]) * keep
        history.append(Step(theta, keep, theta))
    return history


# --- other trained tensors


def power(theta: np.ndarray, a: float) -> np.ndarray:
    """V = theta |theta|^(a - 1)."""
    return theta * np.abs(theta) ** (a - 1)


def powerpropagation(
    weight: np.ndarray,
    keep: np.ndarray,
    gradient: Gradient,
    rates: list[float],
    make: Make,
    a: float,
    sparsity: Any = 0.0,
    moves: Any = False,
) -> list[Step]:
    """Powerpropagation (arXiv 2110.00296): theta starts at sign(W) |W|^(1/a), V = k * theta |theta|^(a -
    1), so dL/dtheta = G * k * a |theta|^(a - 1); score |V|; decay acts on theta.
    """
    theta = np.sign(weight) * np.abs(f64(weight)) ** (1 / a) * keep
    optimizer, steps = make(), len(rates)
    sparsity, moves = per_step(sparsity, steps), per_step(moves, steps)
    history = []
    for t in range(steps):
        g = gradient(power(theta, a), t) * keep * a * np.abs(theta) ** (a - 1)
        theta = optimizer.step(theta, g, rates[t]) * keep
        if moves[t]:
            new = top(np.abs(power(theta, a)), sparsity[t])
            theta, keep = moved(theta, keep, new, optimizer, False), new
        history.append(Step(theta, keep, power(theta, a)))
    return history


def losa(
    weight: np.ndarray,
    keep: np.ndarray,
    adapters: list[np.ndarray],
    gradient: Gradient,
    rates: list[float],
    make: Make,
    alpha: float,
    sparsity: Any,
    moves: Any,
    score: Score = np.abs,
    keep_count: bool = False,
) -> list[Step]:
    """LoSA (arXiv 2502.14816): masked LoRA; at a move W' <- V, the mask is top(score(W')) within the old
    mask, W' is masked, B starts again at 0 and A is the next of `adapters` (the first one serves from the
    start; each may have another rank r, V = W' + (alpha / r) k * (B A)).

    New tensors have new moments. Their step counter starts again too, or goes on with `keep_count`. The bf16
    rounding of the published merges is not modelled.
    """
    base, steps, left = f64(weight) * keep, len(rates), [f64(each) for each in adapters]
    sparsity, moves = per_step(sparsity, steps), per_step(moves, steps)
    a = left.pop(0)
    b, of_a, of_b = np.zeros((len(base), len(a))), make(), make()
    history = []
    for t in range(steps):
        scale = alpha / len(a)
        upstream = gradient(base + scale * keep * (b @ a), t) * keep
        da, db = lora_gradients(upstream, a, b, scale)
        a, b = of_a.step(a, da, rates[t]), of_b.step(b, db, rates[t])
        if moves[t]:
            base = base + scale * keep * (b @ a)
            keep = top(np.where(keep, score(base), -np.inf), sparsity[t])
            base, a = base * keep, left.pop(0)
            b = np.zeros((len(base), len(a)))
            counts = of_a.count if keep_count else 0
            of_a, of_b = make(), make()
            of_a.count = of_b.count = counts
        history.append(Step((a, b), keep, base + alpha / len(a) * keep * (b @ a)))
    return history


def elsa(
    theta: np.ndarray,
    keep: np.ndarray,
    gradient: Gradient,
    rates: list[float],
    make: Make,
    sparsity: Any,
    moves: Any,
    pull: Any,
    weighted: bool = True,
) -> list[Step]:
    """ELSA (arXiv 2510.01650), ADMM on the loss: theta is dense in the forward pass and gets the gradient
    G + lambda (theta - z + u), all of it through Adam; at a move z is the projection of x = theta + u, then
    u <- u + theta - z.

    The projection minimises sum v (z - x)^2 with v Adam's bias-corrected second moment, which stands for
    the diagonal of the Fisher matrix: it keeps top(v * x^2), and the kept z are x itself. It starts at z =
    keep * theta, u = 0. No moment is ever zeroed: v is the weighting. The end is theta * keep with the mask
    of the last z, as for every dense method; z itself differs from it by u. Not `weighted`, v is 1.
    """
    theta, optimizer, steps = f64(theta), make(), len(rates)
    sparsity, moves, pull = (per_step(each, steps) for each in (sparsity, moves, pull))
    z, u = theta * keep, np.zeros(theta.shape)
    history = []
    for t in range(steps):
        g = gradient(theta, t) + pull[t] * (theta - z + u)
        theta = optimizer.step(theta, g, rates[t])
        if moves[t]:
            v = optimizer.v / (1 - optimizer.betas[1] ** optimizer.count)
            keep = top((v if weighted else 1.0) * (theta + u) ** 2, sparsity[t])
            z = np.where(keep, theta + u, 0.0)
            u = u + theta - z
        history.append(Step((theta, z, u), keep, theta))
    return history
