"""Slow, independent reference versions of training with a mask that moves; conventions, the names of
arguments and the table of functions stand in `recovery_oracles.py`.

Each method is a loop of its own, from its own description; `recovery_oracles.four_numbers` says the same
again for those that are a row of four numbers, and the tests hold both against each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from recovery_oracles import ASTAdamW, Gradient, Step, f64, moved, per_step, top

Make = Callable[[], Any]
Score = Callable[[np.ndarray], np.ndarray]


# --- straight-through methods: pruned weights keep their values and get the dense gradient


def sr_ste(
    theta: np.ndarray,
    keep: np.ndarray,
    gradient: Gradient,
    rates: list[float],
    make: Make,
    sparsity: Any,
    moves: Any = True,
    pull: Any = 0.0,
    score: Score = np.abs,
    forget: bool = True,
) -> list[Step]:
    """SR-STE (arXiv 2102.04010): gradient of the pruned point for all weights, plus lambda (1 - k) theta."""
    theta, optimizer, steps = f64(theta), make(), len(rates)
    sparsity, moves, pull = (per_step(each, steps) for each in (sparsity, moves, pull))
    history = []
    for t in range(steps):
        dense = gradient(np.where(keep, theta, 0.0), t)
        theta = optimizer.step(theta, dense, rates[t], pull[t] * np.where(keep, 0.0, theta))
        if moves[t]:
            new = top(score(theta), sparsity[t])
            theta, keep = moved(theta, keep, new, optimizer, True, forget=forget), new
        history.append(Step(theta, keep, np.where(keep, theta, 0.0)))
    return history


def ast(
    theta: np.ndarray,
    keep: np.ndarray,
    gradient: Gradient,
    rates: list[float],
    sparsity: Any,
    moves: Any,
    pull: Any,
    score: Score = np.abs,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    decay: float = 0.0,
    forget: bool = True,
) -> list[Step]:
    """AST (arXiv 2407.20584): SR-STE with AST's AdamW; `score` is |theta| or Wanda's of fixed statistics."""
    return sr_ste(
        theta,
        keep,
        gradient,
        rates,
        lambda: ASTAdamW(betas, eps, decay),
        sparsity,
        moves,
        pull,
        score,
        forget,
    )


def mdgf(
    theta: np.ndarray,
    keep: np.ndarray,
    gradient: Gradient,
    rates: list[float],
    make: Make,
    sparsity: Any,
    moves: Any,
    beta: Any,
    forget: bool = True,
) -> list[Step]:
    """Progressive gradient flow by a decaying mask (arXiv 2402.04744): pruned weights count beta_t times."""
    theta, optimizer, steps = f64(theta), make(), len(rates)
    sparsity, moves, beta = (per_step(each, steps) for each in (sparsity, moves, beta))
    history = []
    for t in range(steps):
        theta = optimizer.step(theta, gradient(np.where(keep, theta, beta[t] * theta), t), rates[t])
        if moves[t]:
            new = top(np.abs(theta), sparsity[t])
            theta, keep = moved(theta, keep, new, optimizer, True, forget=forget), new
        history.append(Step(theta, keep, np.where(keep, theta, beta[t] * theta)))
    return history


def sdgf(
    theta: np.ndarray,
    keep: np.ndarray,
    gradient: Gradient,
    rates: list[float],
    make: Make,
    ladder: list[tuple[int, int]],
    moves: Any = True,
    forget: bool = True,
) -> list[Step]:
    """Progressive gradient flow by a structure that tightens (arXiv 2402.04744): `ladder[t]` = (n, m)."""
    return mdgf(theta, keep, gradient, rates, make, ladder, moves, 0.0, forget)


def dpf(
    theta: np.ndarray,
    keep: np.ndarray,
    gradient: Gradient,
    rates: list[float],
    make: Make,
    sparsity: Any,
    moves: Any,
    forget: bool = True,
) -> list[Step]:
    """Dynamic pruning with feedback (Lin et al., ICLR 2020): the gradient of the pruned point moves the dense
    theta, so pruned weights collect the error.
    """
    theta, optimizer, steps = f64(theta), make(), len(rates)
    sparsity, moves = per_step(sparsity, steps), per_step(moves, steps)
    history = []
    for t in range(steps):
        theta = optimizer.step(theta, gradient(theta * keep, t), rates[t])
        if moves[t]:
            new = top(np.abs(theta), sparsity[t])
            theta, keep = moved(theta, keep, new, optimizer, True, forget=forget), new
        history.append(Step(theta, keep, theta * keep))
    return history


# --- methods that keep nothing of a pruned weight


def gmp(
    theta: np.ndarray,
    keep: np.ndarray,
    gradient: Gradient,
    rates: list[float],
    make: Make,
    sparsity: Any,
    moves: Any,
) -> list[Step]:
    """Gradual magnitude pruning (arXiv 1710.01878): at a move the mask is top(|theta| * k, sparsity[t])."""
    theta, optimizer, steps = f64(theta) * keep, make(), len(rates)
    sparsity, moves = per_step(sparsity, steps), per_step(moves, steps)
    history = []
    for t in range(steps):
        theta = optimizer.step(theta, gradient(theta, t) * keep, rates[t]) * keep
        if moves[t]:
            new = top(np.abs(theta) * keep, sparsity[t])
            theta, keep = moved(theta, keep, new, optimizer, False), new
        history.append(Step(theta, keep, theta))
    return history


def drop_lowest(theta: np.ndarray, keep: np.ndarray, share: float, rule: str = "magnitude") -> np.ndarray:
    """Survivors: keep [R, C] without int(share * kept) weights of each row.

    'magnitude' drops the smallest |theta|. 'set' (SET, Mocanu et al. 2018) drops half from the smallest
    positive and half from the least negative; a zero counts as positive, an odd one is positive, and where
    one sign has too few the other gives the rest. Of equal ones the lower column goes first.
    """
    survivors = keep.copy()
    for i in range(len(theta)):
        kept = [int(j) for j in np.flatnonzero(keep[i])]
        n = int(share * len(kept))
        if rule == "magnitude":
            dropped = sorted(kept, key=lambda j: abs(theta[i, j]))[:n]
        elif rule == "set":
            positive = sorted((j for j in kept if theta[i, j] >= 0), key=lambda j: theta[i, j])
            negative = sorted((j for j in kept if theta[i, j] < 0), key=lambda j: -theta[i, j])
            up = min(len(positive), max(n - n // 2, n - len(negative)))
            dropped = positive[:up] + negative[: n - up]
        else:
            raise ValueError(f"unknown drop rule {rule!r}")
        survivors[i, dropped] = False
    return survivors


def drop_and_grow(
    theta: np.ndarray,
    keep: np.ndarray,
    gradient: Gradient,
    rates: list[float],
    make: Make,
    sparsity: Any,
    moves: Any,
    share: Any,
    growth: str,
    drop: str = "magnitude",
    uniform: list[np.ndarray | None] | None = None,
    c: float = 0.0,
    eps: float = 1.0,
    origin: np.ndarray | None = None,
    still: bool | None = None,
    forget: bool = True,
) -> list[Step]:
    """Dynamic sparse training. At a move the score is +inf for survivors of the drop, elsewhere:

    'random' uniform[t] (SET); 'unfired' uniform[t], plus 1 for those that were never kept (ITOP, arXiv
    2102.02887); 'gradient' |G| (RigL, arXiv 1911.11134); 'momentum' |m| / (sqrt(v) + 1e-8) without bias
    correction, for which all weights feed the moments (gamma = 1); 'ee' |G| + c ln(t) / (N + eps) (DST-EE), t
    counted from 1, N the number of moves, this one included, before which the weight was kept.

    G is that of the step's forward pass, moments are those after the optimizer's step. Dropped weights
    count as pruned: one that is grown again at once keeps its value and its moments. `still`: the optimizer
    does not move in a step in which the mask does; by default so for 'gradient' only.
    """
    theta, optimizer, steps = f64(theta) * keep, make(), len(rates)
    sparsity, moves, share = (per_step(each, steps) for each in (sparsity, moves, share))
    still = growth == "gradient" if still is None else still
    fired, active = keep.copy(), np.zeros(keep.shape)
    history = []
    for t in range(steps):
        dense = gradient(theta, t)
        if not (moves[t] and still):
            g = dense if growth == "momentum" else dense * keep
            theta = optimizer.step(theta, g, rates[t]) * keep
        if moves[t]:
            active += keep
            survivors = drop_lowest(theta, keep, share[t], drop)
            if growth == "random":
                grow = uniform[t]
            elif growth == "unfired":
                grow = uniform[t] + ~fired
            elif growth == "gradient":
                grow = np.abs(dense)
            elif growth == "momentum":
                grow = np.abs(optimizer.m) / (np.sqrt(optimizer.v) + 1e-8)
            elif growth == "ee":
                grow = np.abs(dense) + c * np.log(t + 1) / (active + eps)
            else:
                raise ValueError(f"unknown growth rule {growth!r}")
            new = top(np.where(survivors, np.inf, grow), sparsity[t])
            theta, keep = moved(theta, keep, new, optimizer, False, origin, forget), new
            fired = fired | keep
        history.append(Step(theta, keep, theta))
    return history
