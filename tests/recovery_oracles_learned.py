"""Slow, independent reference versions of methods that learn the mask while the weights are frozen or
change at low rank. Conventions, the names of arguments and the table of functions stand in
`recovery_oracles.py`.

No moments are zeroed here when the mask moves: what is trained is not masked.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
from recovery_oracles import Gradient, Sparsity, Step, f64, per_step, top

Make = Callable[[], Any]


# --- scores


def restricted(score: np.ndarray, keep: np.ndarray, sparsity: Sparsity, share: float) -> np.ndarray:
    """The keep mask on its way to top(score): in each row, or each group of N:M, of the p pairs that would
    flip only max(1, int(share * p)) do: the highest scores come in and the lowest go out. Of equal scores
    the higher column comes in, and the lower one goes out, first.
    """
    wanted, result = top(score, sparsity), keep.copy()
    width = sparsity[1] if isinstance(sparsity, tuple) else score.shape[1]
    for i in range(len(score)):
        for start in range(0, score.shape[1], width):
            columns = range(start, start + width)
            come = [j for j in columns if wanted[i, j] and not keep[i, j]]
            go = [j for j in columns if keep[i, j] and not wanted[i, j]]
            assert len(come) == len(go), "the mask so far must have the count of the sparsity"
            flips = max(1, int(share * len(come))) if come else 0
            result[i, sorted(come, key=lambda j: (-score[i, j], -j))[:flips]] = True
            result[i, sorted(go, key=lambda j: (score[i, j], j))[:flips]] = False
    return result


def jackpots(
    weight: np.ndarray,
    keep: np.ndarray,
    gradient: Gradient,
    rates: list[float],
    make: Make,
    sparsity: Sparsity,
    share: Any = 1.0,
    score: np.ndarray | None = None,
) -> list[Step]:
    """Lottery Jackpots (arXiv 2104.08700): V = W * top(S), dS = G * W; the mask moves in every step, by at
    most `share` of the pairs that would flip. S starts at 1 where kept and 0.99 elsewhere, unless given.
    """
    score = np.where(keep, 1.0, 0.99) if score is None else f64(score)
    optimizer, steps = make(), len(rates)
    share = per_step(share, steps)
    history = []
    for t in range(steps):
        score = optimizer.step(score, gradient(weight * keep, t) * weight, rates[t])
        keep = restricted(score, keep, sparsity, share[t])
        history.append(Step(score, keep, weight * keep))
    return history


# --- patterns


def patterns(n: int, m: int) -> np.ndarray:
    """All N:M patterns, bool [K, m], in lexicographic order of the kept positions: 2:4 begins (0, 1), (0,
    2).
    """
    return np.array([[j in kept for j in range(m)] for kept in combinations(range(m), n)])


def maskllm_logits(
    keep: np.ndarray, normal: np.ndarray, n: int, m: int, std: float = 0.01, strength: float = 3.0
) -> np.ndarray:
    """The first logits [R, C / m, K]: std * normal + (overlap with the prior mask - 1) * std * strength,
    where the overlap is the number of positions that both keep, and `normal` are given standard normal
    numbers.
    """
    groups = keep.reshape(len(keep), -1, 1, m)
    overlap = (groups & patterns(n, m)).sum(axis=-1)
    return std * normal + (overlap - 1) * std * strength


def maskllm_choice(logits: np.ndarray, noise: np.ndarray, kappa: float, tau: float) -> np.ndarray:
    """y = softmax((kappa * P + noise) / tau) over the patterns, [R, C / m, K]."""
    z = (kappa * logits + noise) / tau
    raised = np.exp(z - z.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)


def maskllm_soft(weight: np.ndarray, choice: np.ndarray, n: int, m: int) -> np.ndarray:
    """V = W * sum_p y_p pattern_p, [R, C]."""
    return weight * (choice @ patterns(n, m)).reshape(weight.shape)


def maskllm_hard(logits: np.ndarray, n: int, m: int) -> np.ndarray:
    """The keep mask [R, C] of the largest logit in each group; of equal ones the first pattern."""
    return patterns(n, m)[logits.argmax(axis=-1)].reshape(len(logits), -1)


def maskllm(
    weight: np.ndarray,
    logits: np.ndarray,
    gradient: Gradient,
    rates: list[float],
    make: Make,
    n: int,
    m: int,
    kappa: Any,
    tau: Any,
    noise: list[np.ndarray],
    penalty: Any = 0.0,
) -> list[Step]:
    """MaskLLM (arXiv 2409.17481): logits P of all patterns of each group, V soft while training; the loss has
    - penalty[t] * sum V^2 besides the one of `gradient`. noise[t] [R, C / m, K] are Gumbel numbers.

    Step: theta = P; keep = the hard mask of P; weight = the soft V of the new P under the noise, kappa and
    tau of this step. The merged weight is W * keep.
    """
    logits, steps = f64(logits), len(rates)
    kappa, tau, penalty = (per_step(each, steps) for each in (kappa, tau, penalty))
    optimizer, every = make(), patterns(n, m)
    history = []
    for t in range(steps):
        y = maskllm_choice(logits, noise[t], kappa[t], tau[t])
        soft = maskllm_soft(weight, y, n, m)
        of_mask = (gradient(soft, t) - 2 * penalty[t] * soft) * weight
        of_y = of_mask.reshape(len(weight), -1, m) @ every.T  # [R, C / m, K]
        of_logits = kappa[t] / tau[t] * y * (of_y - (y * of_y).sum(axis=-1, keepdims=True))
        logits = optimizer.step(logits, of_logits, rates[t])
        soft = maskllm_soft(weight, maskllm_choice(logits, noise[t], kappa[t], tau[t]), n, m)
        history.append(Step(logits, maskllm_hard(logits, n, m), soft))
    return history


# --- low-rank scores


def pst_score(theta: np.ndarray, factors: tuple[np.ndarray, ...]) -> np.ndarray:
    """|theta| + A B + r 1^T + 1 c^T for factors (U, Q, A, B, r, c)."""
    _, _, a, b, r, c = factors
    return np.abs(theta) + a @ b + r[:, None] + c[None, :]


def pst(
    weight: np.ndarray,
    factors: tuple[np.ndarray, ...],
    keep: np.ndarray,
    gradient: Gradient,
    rates: list[float],
    make: Make,
    sparsity: Any,
    moves: Any = True,
    straight: Any = True,
    through_score: bool = True,
) -> list[Step]:
    """PST (arXiv 2205.11005): theta = W + U Q, Z = |theta| + A B + r 1^T + 1 c^T, V = theta * top(Z).

    Factors: U [R, ru], Q [ru, C], A [R, ra], B [ra, C], r [R], c [C]; theta of the Step is their tuple.
    Straight-through, dZ = G * theta. By the formula theta has two ways into the loss: dtheta = G * k
    through V, and + sign(theta) * dZ through the score. `through_score=False` leaves the second one out, as
    code does that detaches abs(theta) there. Where not straight[t] the mask counts as frozen: only U and Q
    have a gradient, through V, and the tensors of the score do not step.
    """
    factors = tuple(f64(each) for each in factors)
    optimizers, steps = [make() for _ in factors], len(rates)
    sparsity, moves, straight = (per_step(each, steps) for each in (sparsity, moves, straight))
    history = []
    for t in range(steps):
        u, q, a, b, _, _ = factors
        theta = weight + u @ q
        dense = gradient(theta * keep, t)
        of_theta, of_score = dense * keep, dense * theta
        if straight[t] and through_score:
            of_theta = of_theta + np.sign(theta) * of_score
        slopes = [of_theta @ q.T, u.T @ of_theta]
        if straight[t]:
            slopes += [of_score @ b.T, a.T @ of_score, of_score.sum(axis=1), of_score.sum(axis=0)]
        stepped = [
            optimizer.step(each, slope, rates[t])
            for optimizer, each, slope in zip(optimizers, factors, slopes, strict=False)
        ]
        factors = (*stepped, *factors[len(stepped) :])
        theta = weight + factors[0] @ factors[1]
        if moves[t]:
            keep = top(pst_score(theta, factors), sparsity[t])
        history.append(Step(factors, keep, theta * keep))
    return history
