"""Slow, independent reference versions of training with sparsity, from the papers' formulas: what all methods
share, and the methods with a fixed mask. Nothing here is imported by the package.

Everything is numpy float64. Shapes: theta, weight and keep [R, C] = (out_features, in_features), keep is bool
with True = kept; inputs X [n, C], targets Y [n, R]. No function changes what it is given.

Arguments that recur
--------------------
- `gradient(V, t)` returns G = dL/dV [R, C] of step t = 0, 1, ..., T-1, for any loss. `squared_error` makes
  one.
- `rates`: learning rate of each step; its length is T. Every other argument that schedules decide is a list
  with one entry per step too, or one value for all steps: `sparsity` (a float, or (n, m) for N:M), `moves`
  (does the mask move at the end of this step), `beta`, `gamma`, `pull` (lambda), `rho`, `share`, `dense`,
  `straight`.
- `make()` returns a fresh optimizer: `lambda: SGD(0.9)`, `lambda: AdamW(decay=0.1)`, `lambda: ASTAdamW()`.
  A method with several trained tensors makes one for each.
- `score(theta)` returns [R, C], by default |theta|.

Result: a list with one `Step(theta, keep, weight)` after each step. `theta` is what the optimizer moves (a
tuple where that is several tensors), `keep` the mask after a move, `weight` the V that the next forward
pass would use with the constants of this step (its beta, its noise).

Conventions
-----------
`top(Z, s)` prunes exactly int(C * s) lowest scores of each row, or keeps the n highest of every aligned
group of m columns; of equal scores the lower column is pruned first.

Order within step t: V from theta, keep and beta; G; g = G * (k + gamma (1 - k)); clipping, if any; the
optimizer's step with g and the decay of pruned weights; theta <- theta * (k + rho (1 - k)) with the mask so
far; then, where moves[t], the new mask = top(score, sparsity[t]). At a move:
- rho = 0: newly pruned weights become 0, grown weights begin at 0 (or at `origin`, where that is given);
- rho > 0: theta keeps its values;
- moments are zeroed where the mask changed, both ways; the optimizer's step counter is kept. This concerns
  tensors with an entry per weight that the mask multiplies. ELSA's theta, and the scores, logits and low-rank
  factors of learned masks, keep their moments. `forget=False` leaves moments alone everywhere, as some
  published code does.

Optimizers: `SGD`: buffer = mu * buffer + g, theta -= rate * buffer. `AdamW`: bias correction, decoupled
decay. Both take the decay of pruned weights, lambda (1 - k) theta, as a part of g: with `AdamW` it passes
the normalisation, which is the trap of the survey. `ASTAdamW` adds it to the first moment.

Table of functions
------------------
Here: shared, and the mask fixed.

| function | arguments |
|---|---|
| top | score, sparsity |
| squared_error | batches [(X, Y), ...] -> gradient |
| SGD, AdamW, ASTAdamW | momentum, decay; betas, eps, decay |
| clipped | gradients, limit |
| four_numbers | theta, keep, gradient, rates, make, beta, gamma, pull, rho, sparsity, moves, ... |
| masked_fine_tuning | theta, keep, gradient, rates, make (EBFT: with the block error as the loss) |
| masked_lora | weight, keep, a, gradient, rates, make, alpha -> theta = (A, B) |
| scale_lora | weight, a, b, gradient, rates, make -> theta = (A, B) |
| spp | weight, a, b, gradient, rates, make, c -> theta = (a, b) |
| norms | gain, bias, weight, batches, rates, make -> theta = (gain, bias) |
| soup_sparsities | sparsity, phases |
| soups | theta, keep, phases [(sparsity, runs)] -> one Step per phase |
| greedy_soup | weights, loss |

`recovery_oracles_evolving.py`: the mask moves.

| function | arguments after (theta, keep, gradient, rates, make) |
|---|---|
| sr_ste | sparsity, moves, pull, score, forget |
| ast | sparsity, moves, pull, score, betas, eps, decay, forget (no `make`) |
| mdgf | sparsity, moves, beta, forget |
| sdgf | ladder, moves, forget |
| dpf | sparsity, moves, forget |
| gmp | sparsity, moves |
| drop_lowest | theta, keep, share, rule -> survivors |
| drop_and_grow | sparsity, moves, share, growth, drop, uniform, c, eps, origin, still, forget |

`recovery_oracles_phases.py`: the mask moves in phases, or there is more than theta and a mask.

| function | arguments after (theta, keep, gradient, rates, make) |
|---|---|
| acdc | sparsity, dense |
| gap | sparsity, parts, dense_part; thetas, keeps, gradients are lists |
| iss_p | sparsity, rho, soft, mask_first, forget |
| powerpropagation | a, sparsity, moves; `weight` instead of theta |
| losa | (weight, keep, adapters, gradient, rates, make), alpha, sparsity, moves, score, keep_count |
| elsa | sparsity, moves, pull -> theta = (theta, z, u) |

`recovery_oracles_learned.py`: the mask is learned, the weights are frozen or of low rank.

| function | arguments |
|---|---|
| jackpots | weight, keep, gradient, rates, make, sparsity, share, score -> theta = the scores |
| restricted | score, keep, sparsity, share -> keep |
| maskllm | weight, logits, gradient, rates, make, n, m, kappa, tau, noise, penalty -> theta = the logits |
| patterns, maskllm_logits, maskllm_choice, maskllm_soft, maskllm_hard | its parts |
| pst | weight, factors (U, Q, A, B, r, c), keep, gradient, rates, make, sparsity, moves, straight, ... |

`recovery_oracles_objectives.py`: a value and its gradient, over the tokens that count.

| function | arguments |
|---|---|
| next_token | logits [..., V], labels, counted |
| next_labels | tokens [N, T] -> labels |
| kd | student, teacher, tau, counted |
| squarehead | hidden [list], teacher [list], counted, eps |
| block_error | output, target, counted |

`recovery_oracles_schedules.py`: pure functions of progress, or of a number of steps.

| function | arguments |
|---|---|
| linear, cubic | progress, start, end, first, last |
| losa_sparsity | round, rounds, sparsity |
| acdc_dense | progress, warm_up, length, last_dense, last_compressed |
| gap_part | progress, parts, frames, last |
| sdgf_ladder, sdgf_wide_ladder, rung | n, m; n, m, factor; progress, rungs, last |
| drop_share | progress, share, last, shape |
| beta, pull | steps, c, shape; steps, strength, ramp |
| rate | progress, peak, warm_up, floor, shape |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from oracles import nm_mask, unstructured_mask

Gradient = Callable[[np.ndarray, int], np.ndarray]
Sparsity = float | tuple[int, int]


class Step(NamedTuple):
    """What a step left: trained tensors, keep mask [R, C], and the weight V [R, C] of the next forward
    pass.
    """

    theta: Any
    keep: np.ndarray
    weight: np.ndarray


def f64(values: Any) -> np.ndarray:
    """A float64 copy."""
    return np.array(values, dtype=np.float64)


def per_step(value: Any, steps: int) -> list[Any]:
    """The list itself, of length `steps`, or one value repeated; a tuple (n, m) is one value."""
    if isinstance(value, list):
        assert len(value) == steps, f"{len(value)} values for {steps} steps"
        return value
    return [value] * steps


# --- what all methods share


def top(score: np.ndarray, sparsity: Sparsity) -> np.ndarray:
    """Keep mask of score [R, C], exact: int(C * sparsity) pruned per row, or N:M for a tuple (n, m)."""
    if isinstance(sparsity, tuple):
        return nm_mask(score, *sparsity)
    return unstructured_mask(score, sparsity)


def squared_error(batches: Sequence[tuple[np.ndarray, np.ndarray]]) -> Gradient:
    """The gradient 2 / (n R) (X V^T - Y)^T X of the mean of (X V^T - Y)^2; step t sees batch t mod the
    number.

    With Y the dense block's output on the same X this is the block error (EBFT, arXiv 2402.12419).
    """

    def gradient(weight: np.ndarray, t: int) -> np.ndarray:
        x, y = batches[t % len(batches)]
        return 2 / y.size * (x @ weight.T - y).T @ x

    return gradient


class SGD:
    """Stochastic gradient descent with heavy-ball momentum; `decay` times theta is part of the gradient."""

    def __init__(self, momentum: float = 0.0, decay: float = 0.0) -> None:
        self.momentum, self.decay = momentum, decay
        self.buffer: Any = 0.0

    def step(self, theta: np.ndarray, g: np.ndarray, rate: float, pull: Any = 0.0) -> np.ndarray:
        """Theta after a step; `pull` is lambda (1 - k) theta."""
        self.buffer = self.momentum * self.buffer + g + pull + self.decay * theta
        return theta - rate * self.buffer

    def forget(self, changed: np.ndarray) -> None:
        self.buffer = np.where(changed, 0.0, self.buffer)


class AdamW:
    """Adam with bias correction and decoupled decay (Loshchilov and Hutter, arXiv 1711.05101)."""

    def __init__(
        self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, decay: float = 0.0
    ) -> None:
        self.betas, self.eps, self.decay, self.count = betas, eps, decay, 0
        self.m: Any = 0.0
        self.v: Any = 0.0

    def step(self, theta: np.ndarray, g: np.ndarray, rate: float, pull: Any = 0.0) -> np.ndarray:
        """Theta after a step; `pull` is added to the gradient, so it passes the normalisation."""
        b1, b2 = self.betas
        g = g + pull
        self.count += 1
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g**2
        m_hat, v_hat = self.m / (1 - b1**self.count), self.v / (1 - b2**self.count)
        return theta * (1 - rate * self.decay) - rate * m_hat / (np.sqrt(v_hat) + self.eps)

    def forget(self, changed: np.ndarray) -> None:
        """Zero both moments there; the step counter stays."""
        self.m, self.v = np.where(changed, 0.0, self.m), np.where(changed, 0.0, self.v)


class ASTAdamW(AdamW):
    """AST's AdamW (arXiv 2407.20584): `u = m + pull`, the second moment is one of u^2, not of g^2.

    With pull = 0 this is not AdamW: the second moment is one of the smoothed gradient.
    """

    def step(self, theta: np.ndarray, g: np.ndarray, rate: float, pull: Any = 0.0) -> np.ndarray:
        b1, b2 = self.betas
        self.count += 1
        self.m = b1 * self.m + (1 - b1) * g
        u = self.m + pull
        self.v = b2 * self.v + (1 - b2) * u**2
        moved = u / (np.sqrt(self.v / (1 - b2**self.count)) + self.eps)
        return (1 - rate * self.decay) * theta - rate / (1 - b1**self.count) * moved


def clipped(gradients: list[np.ndarray], limit: float) -> list[np.ndarray]:
    """All gradients times limit / norm where their common norm is above the limit.

    They come after the gradient rule, so entries that do not move are zero in them and count for nothing.
    """
    norm = np.sqrt(sum(float((g**2).sum()) for g in gradients))
    return [g * min(1.0, limit / norm) if norm > 0 else g for g in gradients]


def moved(
    theta: np.ndarray,
    keep: np.ndarray,
    new: np.ndarray,
    optimizer: Any,
    retained: bool,
    origin: np.ndarray | None = None,
    forget: bool = True,
) -> np.ndarray:
    """Theta after a move of the mask from `keep` to `new`; the optimizer forgets where the mask changed."""
    if forget:
        optimizer.forget(keep != new)
    if retained:
        return theta
    begin = np.zeros(theta.shape) if origin is None else origin
    return np.where(new & ~keep, begin, np.where(new, theta, 0.0))


def four_numbers(
    theta: np.ndarray,
    keep: np.ndarray,
    gradient: Gradient,
    rates: list[float],
    make: Callable[[], Any],
    *,
    beta: Any = 0.0,
    gamma: Any = 0.0,
    pull: Any = 0.0,
    rho: Any = 0.0,
    sparsity: Any = 0.0,
    moves: Any = False,
    score: Callable[[np.ndarray], np.ndarray] = np.abs,
    origin: np.ndarray | None = None,
    forget: bool = True,
    clip: float | None = None,
) -> list[Step]:
    """Any method that is a row of four numbers: the general step, written once more besides the methods."""
    theta, keep, optimizer, steps = f64(theta), keep.copy(), make(), len(rates)
    beta, gamma, pull, rho = (per_step(each, steps) for each in (beta, gamma, pull, rho))
    sparsity, moves = per_step(sparsity, steps), per_step(moves, steps)
    history = []
    for t in range(steps):
        k = keep.astype(np.float64)
        dense = gradient(theta * (k + beta[t] * (1 - k)), t)
        g = dense * (k + gamma[t] * (1 - k))
        if clip is not None:
            (g,) = clipped([g], clip)
        theta = optimizer.step(theta, g, rates[t], pull[t] * (1 - k) * theta)
        theta = theta * (k + rho[t] * (1 - k))
        if moves[t]:
            new = top(score(theta), sparsity[t])
            theta, keep = moved(theta, keep, new, optimizer, rho[t] > 0, origin, forget), new
        k = keep.astype(np.float64)
        history.append(Step(theta, keep, theta * (k + beta[t] * (1 - k))))
    return history


# --- the mask stays


def masked_fine_tuning(
    theta: np.ndarray, keep: np.ndarray, gradient: Gradient, rates: list[float], make: Callable[[], Any]
) -> list[Step]:
    """Full fine-tuning of the kept weights (Kurtic et al., arXiv 2310.06927; ASP, Sparse-Llama, EBFT)."""
    theta, optimizer = f64(theta) * keep, make()
    history = []
    for t, rate in enumerate(rates):
        theta = optimizer.step(theta, gradient(theta, t) * keep, rate) * keep
        history.append(Step(theta, keep, theta))
    return history


def lora_gradients(
    upstream: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """(dA [r, C], dB [R, r]) of scale * B A for the gradient `upstream` [R, C] of that product."""
    return scale * b.T @ upstream, scale * upstream @ a.T


def masked_lora(
    weight: np.ndarray,
    keep: np.ndarray,
    a: np.ndarray,
    gradient: Gradient,
    rates: list[float],
    make: Callable[[], Any],
    alpha: float,
) -> list[Step]:
    """V = W' + (alpha / r) k * (B A), B [R, r] zero, A [r, C] given (PERP, arXiv 2312.15230; SQFT,
    2410.03750).
    """
    base, a = f64(weight) * keep, f64(a)
    b, scale = np.zeros((len(base), len(a))), alpha / len(a)
    of_a, of_b = make(), make()
    history = []
    for t, rate in enumerate(rates):
        upstream = gradient(base + scale * keep * (b @ a), t) * keep
        da, db = lora_gradients(upstream, a, b, scale)
        a, b = of_a.step(a, da, rate), of_b.step(b, db, rate)
        history.append(Step((a, b), keep, base + scale * keep * (b @ a)))
    return history


def scale_lora(
    weight: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    gradient: Gradient,
    rates: list[float],
    make: Callable[[], Any],
) -> list[Step]:
    """V = W' * (B A), B [R, r], A [r, C], all 1 / sqrt(r) at the start in PERP (arXiv 2312.15230)."""
    base, a, b = f64(weight), f64(a), f64(b)
    of_a, of_b = make(), make()
    history = []
    for t, rate in enumerate(rates):
        da, db = lora_gradients(gradient(base * (b @ a), t) * base, a, b, 1.0)
        a, b = of_a.step(a, da, rate), of_b.step(b, db, rate)
        history.append(Step((a, b), base != 0, base * (b @ a)))
    return history


def spp_weight(weight: np.ndarray, a: np.ndarray, b: np.ndarray, c: float) -> np.ndarray:
    """W' * (1 + c a_i b_{floor(i n / R), j}) for a [R, 1], b [n, C]."""
    rows, columns = weight.shape
    result = np.empty(weight.shape)
    for i in range(rows):
        for j in range(columns):
            result[i, j] = weight[i, j] * (1 + c * a[i, 0] * b[i * len(b) // rows, j])
    return result


def spp_gradients(
    upstream: np.ndarray, weight: np.ndarray, a: np.ndarray, b: np.ndarray, c: float
) -> tuple[np.ndarray, np.ndarray]:
    """(da [R, 1], db [n, C]) for the gradient `upstream` [R, C] of V."""
    rows, columns = weight.shape
    da, db = np.zeros(a.shape), np.zeros(b.shape)
    for i in range(rows):
        for j in range(columns):
            part = i * len(b) // rows
            da[i, 0] += upstream[i, j] * weight[i, j] * c * b[part, j]
            db[part, j] += upstream[i, j] * weight[i, j] * c * a[i, 0]
    return da, db


def spp(
    weight: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    gradient: Gradient,
    rates: list[float],
    make: Callable[[], Any],
    c: float = 2.0,
) -> list[Step]:
    """Weights scaled by their row and their column (SPP, arXiv 2405.16057); a starts at 0, R divisible by
    n.
    """
    weight, a, b = f64(weight), f64(a), f64(b)
    of_a, of_b = make(), make()
    history = []
    for t, rate in enumerate(rates):
        da, db = spp_gradients(gradient(spp_weight(weight, a, b, c), t), weight, a, b, c)
        a, b = of_a.step(a, da, rate), of_b.step(b, db, rate)
        history.append(Step((a, b), weight != 0, spp_weight(weight, a, b, c)))
    return history


def norms(
    gain: np.ndarray,
    bias: np.ndarray | None,
    weight: np.ndarray,
    batches: Sequence[tuple[np.ndarray, np.ndarray]],
    rates: list[float],
    make: Callable[[], Any],
) -> list[Step]:
    """Only gains and existing biases train (PERP, arXiv 2312.15230): y = gain * (X V^T) + bias, V fixed.

    Loss: the mean of (y - Y)^2. `gain` and `bias` are [R], or of shape () for one of all outputs.
    """
    gain, bias = f64(gain), None if bias is None else f64(bias)
    of_gain, of_bias = make(), make()
    history = []
    for t, rate in enumerate(rates):
        x, y = batches[t % len(batches)]
        product = x @ weight.T
        error = 2 / y.size * (gain * product + (0.0 if bias is None else bias) - y)
        slope, offset = (error * product).sum(axis=0), error.sum(axis=0)
        if bias is not None:
            bias = of_bias.step(bias, offset if bias.ndim else offset.sum(), rate)
        gain = of_gain.step(gain, slope if gain.ndim else slope.sum(), rate)
        history.append(Step((gain, bias), weight != 0, weight))
    return history


def soup_sparsities(sparsity: float, phases: int) -> list[float]:
    """Sparsity after each phase, when each prunes 1 - (1 - s)^(1/n) of what is left; the last one is s
    itself.
    """
    return [1 - (1 - sparsity) ** (i / phases) for i in range(1, phases)] + [sparsity]


def soups(
    theta: np.ndarray,
    keep: np.ndarray,
    phases: list[tuple[Sparsity, list[tuple[Gradient, list[float], Callable[[], Any]]]]],
) -> list[Step]:
    """Sparse Model Soups (arXiv 2306.16788), uniform: a phase prunes the last average by |theta| * k to its
    sparsity, trains the same start once for each run (gradient, rates, make), and averages the ends.
    """
    theta = f64(theta) * keep
    history = []
    for sparsity, runs in phases:
        keep = top(np.abs(theta) * keep, sparsity)
        ends = [masked_fine_tuning(theta * keep, keep, *run)[-1].theta for run in runs]
        theta = sum(ends) / len(ends)
        history.append(Step(theta, keep, theta))
    return history


def greedy_soup(weights: list[np.ndarray], loss: Callable[[np.ndarray], float]) -> np.ndarray:
    """The average of those that help (Wortsman et al., arXiv 2203.05482): in order of their held-out loss,
    each is taken in where the loss of the average does not rise.
    """
    order = sorted(range(len(weights)), key=lambda i: loss(weights[i]))
    taken = [weights[order[0]]]
    for i in order[1:]:
        if loss(sum([*taken, weights[i]]) / (len(taken) + 1)) <= loss(sum(taken) / len(taken)):
            taken.append(weights[i])
    return sum(taken) / len(taken)
