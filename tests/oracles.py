"""Slow, independent reference versions, written from the papers' formulas; nothing here is imported by the
package.

Everything is numpy float64. Shapes: weight [R, C] = (out_features, in_features), inputs [T, C], masks bool
[R, C] with True = kept. Ties: rankings are ascending and stable, so among equal scores the lower index is
pruned first. Counts are the literal floating point products, int(C * sparsity) and int(R * C * sparsity).
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

TINY_VARIANCE = (
    1e-12  # variances below this (0 above all) count as this much, so D / var^p is never NaN or infinite
)


def _f64(values: ArrayLike) -> np.ndarray:
    return np.asarray(values, dtype=np.float64)


# --- input statistics
# -------------------------------------------------------------------------------------------------


def input_statistics(sequences: list[np.ndarray]) -> dict[str, Any]:
    """Per-feature statistics of calibration inputs, each sequence [T_i, C]; Gram = X^T X / T (SparseGPT,
    Wanda, DSnoT).

    'within_variance' is the token-weighted mean of each sequence's own population variance (published DSnoT
    code). Returns count (int), mean / second_moment / variance / within_variance [C], gram [C, C]. Empty
    sequences count for nothing.
    """
    parts = [_f64(s) for s in sequences if len(s) > 0]
    x = np.concatenate(parts, axis=0)
    count = x.shape[0]
    mean = x.sum(axis=0) / count
    within = np.zeros(x.shape[1])
    for part in parts:
        own_mean = part.sum(axis=0) / len(part)
        within += ((part - own_mean) ** 2).sum(axis=0)  # = T_i * own population variance
    return {
        "count": count,
        "mean": mean,
        "second_moment": (x**2).sum(axis=0) / count,
        "variance": ((x - mean) ** 2).sum(axis=0) / count,
        "within_variance": within / count,
        "gram": x.T @ x / count,
    }


def published_sums(sequences: list[np.ndarray]) -> dict[str, np.ndarray]:
    """The running means in float32 that the published code of SparseGPT, Wanda and DSnoT keeps, of sequences
    [T, C] one after the other: the sum of the inputs, their sum of squares, their variance within a sequence,
    and the Gram matrix times two.
    """
    one, columns = np.float32(1), sequences[0].shape[1]
    total = squares = variance = np.zeros(columns, np.float32)
    gram = np.zeros((columns, columns), np.float32)
    for n, sequence in enumerate(sequences):
        x = np.asarray(sequence, np.float32)
        before, weight = np.float32(n / (n + 1)), one / np.float32(n + 1)
        total = total * before + x.sum(axis=0) * weight
        squares = squares * before + (x**2).sum(axis=0) * weight
        variance = (variance * np.float32(n) + x.var(axis=0)) / np.float32(n + 1)
        scaled = x * np.sqrt(np.float32(2 / (n + 1)))
        gram = gram * before + scaled.T @ scaled
    return {"sum": total, "squares": squares, "variance": variance, "gram": gram}


# --- scores and masks
# -------------------------------------------------------------------------------------------------


def magnitude_score(weight: ArrayLike) -> np.ndarray:
    """|W_ij|, [R, C] (magnitude pruning)."""
    return np.abs(_f64(weight))


def wanda_score(weight: ArrayLike, second_moment: ArrayLike) -> np.ndarray:
    """|W_ij| * sqrt(mean of x_j^2), weight [R, C], second_moment [C] (Wanda, arXiv 2306.11695)."""
    w, m2 = _f64(weight), _f64(second_moment)
    score = np.zeros(w.shape)
    for j in range(w.shape[1]):
        score[:, j] = np.abs(w[:, j]) * np.sqrt(m2[j])
    return score


def _keep_all_but_lowest(scores: np.ndarray, count: int) -> np.ndarray:
    """Bool [K] for scores [K]: False for the `count` lowest; among equals the lower index is pruned first."""
    keep = np.ones(len(scores), dtype=bool)
    for j in sorted(range(len(scores)), key=lambda j: scores[j])[:count]:
        keep[j] = False
    return keep


def unstructured_mask(score: ArrayLike, sparsity: float, scope: str = "row") -> np.ndarray:
    """Keep mask of score [R, C]: exactly int(C * sparsity) pruned in each row, or int(R * C * sparsity) in
    the matrix.

    Scope 'row' as in Wanda, 'matrix' as in layer-wise magnitude pruning (row-major order there).
    """
    s = _f64(score)
    rows, columns = s.shape
    if scope == "row":
        return np.stack([_keep_all_but_lowest(s[i], int(columns * sparsity)) for i in range(rows)])
    if scope == "matrix":
        return _keep_all_but_lowest(s.reshape(-1), int(rows * columns * sparsity)).reshape(rows, columns)
    raise ValueError(f"unknown scope {scope!r}")


def nm_mask(score: ArrayLike, n: int, m: int) -> np.ndarray:
    """Keep mask of score [R, C]: in every aligned group of m columns the n highest are kept (N:M)."""
    s = _f64(score)
    rows, columns = s.shape
    if columns % m:
        raise ValueError(f"{columns} columns are not divisible by {m}")
    keep = np.zeros(s.shape, dtype=bool)
    for i in range(rows):
        for start in range(0, columns, m):
            keep[i, start : start + m] = _keep_all_but_lowest(s[i, start : start + m], m - n)
    return keep


# --- SparseGPT
# --------------------------------------------------------------------------------------------------------


def _live_and_damped(weight: ArrayLike, gram: ArrayLike, damp: float) -> tuple[np.ndarray, np.ndarray]:
    """Copies of weight [R, C] with dead columns zeroed and of gram [C, C] with dead diagonal 1, then damped
    (SparseGPT).

    The damping term is damp * mean(diag), the mean taken after dead entries became 1, as in the published
    code.
    """
    w, g = _f64(weight).copy(), _f64(gram).copy()
    for j in range(g.shape[0]):
        if g[j, j] == 0:
            g[j, j] = 1.0
            w[:, j] = 0.0
    return w, g + damp * np.mean(np.diag(g)) * np.eye(g.shape[0])


def _block_mask(saliency: np.ndarray, a: int, sparsity: float, scope: str) -> np.ndarray:
    """Keep mask of one block's saliency [R, b - a], columns a..b, by the difference of the counts up to b and
    up to a.
    """
    rows, width = saliency.shape
    b = a + width
    if scope == "matrix":
        count = int(rows * b * sparsity) - int(rows * a * sparsity)
        return _keep_all_but_lowest(saliency.reshape(-1), count).reshape(rows, width)
    if scope == "row":
        count = int(b * sparsity) - int(a * sparsity)
        return np.stack([_keep_all_but_lowest(saliency[i], count) for i in range(rows)])
    raise ValueError(f"unknown scope {scope!r}")


def sparsegpt(
    weight: ArrayLike,
    gram: ArrayLike,
    sparsity: float | None = None,
    n: int | None = None,
    m: int | None = None,
    scope: str = "matrix",
    damp: float = 0.01,
    block: int = 128,
) -> tuple[np.ndarray, np.ndarray]:
    """SparseGPT (arXiv 2301.00774), weight [R, C], gram [C, C] -> (new weight, keep), columns solved left to
    right.

    Every error is spread over all later columns at once; doing so lazily per block is the same sum. The block
    only says when an unstructured mask is chosen; an N:M mask is chosen when its group's first column is
    reached.
    """
    w, g = _live_and_damped(weight, gram, damp)
    rows, columns = w.shape
    if len({sparsity is None, n is not None, m is not None}) != 1:
        raise ValueError("give either sparsity or both n and m")
    if m is not None and columns % m:
        raise ValueError(f"{columns} columns are not divisible by {m}")
    u = np.linalg.cholesky(np.linalg.inv(g)).T  # upper triangular, inverse = U^T U
    step = block if m is None else m
    keep = np.ones((rows, columns), dtype=bool)
    for j in range(columns):
        if j % step == 0:
            b = min(j + step, columns)
            saliency = w[:, j:b] ** 2 / np.diag(u)[j:b] ** 2
            if n is not None and m is not None:
                keep[:, j:b] = nm_mask(saliency, n, m)
            elif sparsity is not None:
                keep[:, j:b] = _block_mask(saliency, j, sparsity, scope)
        for i in range(rows):
            if not keep[i, j]:
                error = w[i, j] / u[j, j]
                w[i, j + 1 :] -= error * u[j, j + 1 :]
                w[i, j] = 0.0
    return w, keep


def sparsegpt_elimination(
    weight: ArrayLike, gram: ArrayLike, keep: ArrayLike, damp: float = 0.01
) -> np.ndarray:
    """Optimal Brain Surgeon for a given mask keep [R, C], columns left to right (SparseGPT, arXiv 2301.00774,
    section 3).

    At column j the inverse of the Gram matrix of columns j.. is recomputed from scratch; removing w_j changes
    the others by -w_j / inv_00 * inv_0:. Same result as `sparsegpt` with the same mask. weight [R, C], gram
    [C, C] -> weight [R, C].
    """
    w, g = _live_and_damped(weight, gram, damp)
    mask = np.asarray(keep, dtype=bool)
    for j in range(w.shape[1]):
        inverse = np.linalg.inv(g[j:, j:])
        for i in range(w.shape[0]):
            if not mask[i, j]:
                w[i, j:] -= w[i, j] / inverse[0, 0] * inverse[0, :]
                w[i, j] = 0.0
    return w


# --- DSnoT
# ------------------------------------------------------------------------------------------------------------


def _dsnot_row(
    contribution: list[float],
    ratio: list[float],
    keep: np.ndarray,
    prune_score: list[float],
    initial_score: list[float],
    group: int | None,
    max_cycles: int,
    threshold: float,
    walk_on: bool,
) -> list[np.ndarray]:
    """Masks [C] of one row after 0, 1, 2, ...

    DSnoT cycles (arXiv 2310.08915); contribution = D, ratio = D / var^p.
    """
    d, now = contribution, keep.copy()
    masks = [now.copy()]
    pruned = sorted((j for j in range(len(d)) if not keep[j]), key=lambda j: ratio[j])
    kept = sorted((j for j in range(len(d)) if keep[j]), key=lambda j: prune_score[j])
    growable = {
        1: [j for j in reversed(pruned) if d[j] > 0],
        -1: [j for j in pruned if d[j] < 0],
    }  # by the sign of the error
    prunable = {1: [j for j in kept if d[j] < 0], -1: [j for j in kept if d[j] > 0]}
    spare = sorted((j for j in range(len(d)) if keep[j]), key=lambda j: initial_score[j]) if group else []
    if (
        walk_on
    ):  # as the published code: behind one sign's candidates come the other's, the highest score first
        prunable = {sign: [*prunable[sign], *reversed(prunable[-sign])] for sign in (1, -1)}
    error = sum(d[j] for j in range(len(d)) if not keep[j])
    while len(masks) <= max_cycles and abs(error) > threshold:
        sign = 1 if error > 0 else -1
        if not growable[sign]:
            break
        grow = growable[sign][0]
        choices = [j for j in spare if j // group == grow // group] if group else prunable[sign]
        if not choices:
            break
        prune = choices[0]
        if not now[prune]:  # walking on, the two lists meet
            break
        moved = error + d[prune] - d[grow]
        if group and sign * moved < 0:  # N:M only: the step would flip the sign; landing on 0 is no flip
            break
        growable[sign].remove(grow)
        (spare if group else prunable[sign]).remove(prune)
        now[grow], now[prune], error = True, False, moved
        masks.append(now.copy())
    return masks


def _dsnot_histories(
    weight: ArrayLike,
    keep: ArrayLike,
    mean: ArrayLike,
    variance: ArrayLike,
    prune_score: ArrayLike,
    sequence_length: float,
    sparsity_pattern: tuple[int, int] | None,
    initial_score: ArrayLike | None,
    max_cycles: int,
    threshold: float,
    power: float,
    walk_on: bool = False,
) -> list[list[np.ndarray]]:
    """For each row its masks after every cycle; D_ij = W_ij * mean_j * sequence_length, arguments as for
    `dsnot`.
    """
    if sparsity_pattern is not None and initial_score is None:
        raise ValueError("an N:M pattern needs the initial score")
    w, mask, score = _f64(weight), np.asarray(keep, dtype=bool), _f64(prune_score)
    contribution = w * (_f64(mean) * sequence_length)
    ratio = contribution / np.maximum(_f64(variance), TINY_VARIANCE) ** power
    group = None if sparsity_pattern is None else sparsity_pattern[1]
    first = score if initial_score is None else _f64(initial_score)  # only looked at with a pattern
    rows = []
    for i in range(len(w)):
        d, r, s, f = (a[i].tolist() for a in (contribution, ratio, score, first))
        rows.append(_dsnot_row(d, r, mask[i], s, f, group, max_cycles, threshold, walk_on))
    return rows


def dsnot(
    weight: ArrayLike,
    keep: ArrayLike,
    mean: ArrayLike,
    variance: ArrayLike,
    prune_score: ArrayLike,
    sequence_length: float,
    sparsity_pattern: tuple[int, int] | None = None,
    initial_score: ArrayLike | None = None,
    max_cycles: int = 50,
    threshold: float = 0.1,
    power: float = 1.0,
    walk_on: bool = False,
) -> np.ndarray:
    """DSnoT (arXiv 2310.08915): refined keep mask; weight, keep, both scores [R, C]; mean, variance [C];
    pattern (n, m).

    Only weights whose D has the sign of the row's error grow, each once, all from the initial mask; a row
    stops when its candidates run out, so counts never change. Variances below TINY_VARIANCE count as that: a
    constant feature with nonzero mean then ranks at the extreme end, a feature that is always 0 has D = 0 and
    is never grown.
    """
    arguments = (
        prune_score,
        sequence_length,
        sparsity_pattern,
        initial_score,
        max_cycles,
        threshold,
        power,
        walk_on,
    )
    histories = _dsnot_histories(weight, keep, mean, variance, *arguments)
    return np.stack([masks[-1] for masks in histories])


def dsnot_safe(
    weight: ArrayLike,
    keep: ArrayLike,
    mean: ArrayLike,
    variance: ArrayLike,
    prune_score: ArrayLike,
    sequence_length: float,
    sample: ArrayLike,
    sparsity_pattern: tuple[int, int] | None = None,
    initial_score: ArrayLike | None = None,
    max_cycles: int = 50,
    threshold: float = 0.1,
    power: float = 1.0,
    margin: float = 0.0,
) -> np.ndarray:
    """DSnoT (arXiv 2310.08915) stopped per row at the cycle with the least output error on sample [S, C];
    cycle 0 unless below 1 - margin.

    The error e = sample @ (w * pruned) is computed anew for every recorded mask; what counts is the larger of
    ||e||^2 and ||e - mean(e)||^2, each over its value for the first mask; the first of equals wins.
    """
    w, x = _f64(weight), _f64(sample)
    histories = _dsnot_histories(
        weight,
        keep,
        mean,
        variance,
        prune_score,
        sequence_length,
        sparsity_pattern,
        initial_score,
        max_cycles,
        threshold,
        power,
    )
    best = []
    for i, masks in enumerate(histories):
        outputs = [x @ np.where(mask, 0.0, w[i]) for mask in masks]
        raw = [float(np.sum(e**2)) for e in outputs]
        spread = [float(np.sum((e - e.mean()) ** 2)) for e in outputs]
        worse = [max(a / raw[0], b / spread[0]) for a, b in zip(raw, spread, strict=True)]
        lowest = min(range(len(masks)), key=lambda cycle: worse[cycle])
        best.append(masks[lowest if worse[lowest] < 1 - margin else 0])
    return np.stack(best)


# --- measures
# ---------------------------------------------------------------------------------------------------------


def relative_error(weight: ArrayLike, new_weight: ArrayLike, inputs: ArrayLike) -> float:
    """||X (W - W')^T||^2 / ||X W^T||^2, the layer-wise error of SparseGPT's problem; weights [R, C], inputs
    [T, C].
    """
    w, v, x = _f64(weight), _f64(new_weight), _f64(inputs)
    return float(np.sum((x @ (w - v).T) ** 2) / np.sum((x @ w.T) ** 2))


def perplexity(losses_per_window: list[np.ndarray]) -> float:
    """exp of the mean over windows of each window's mean token loss; each entry [tokens] (the papers'
    perplexity).
    """
    return float(np.exp(np.mean([np.mean(_f64(losses)) for losses in losses_per_window])))


# --- tuning a block
# ---------------------------------------------------------------------------------------------------


def block_tune_batches(rows: list[int], batch: int, steps: int, shuffle: Any) -> list[list[int]]:
    """The sequences of each step: every pass over `rows` in a fresh order of `shuffle(n)`, a rest shorter
    than a batch dropped.
    """
    batches: list[list[int]] = []
    queue: list[int] = []
    while len(batches) < steps:
        if len(queue) < batch:
            queue = [rows[i] for i in shuffle(len(rows))]
        batches.append(queue[:batch])
        queue = queue[batch:]
    return batches


def relative_error_of_rows(weight: ArrayLike, x: ArrayLike, y: ArrayLike) -> float:
    """`||x W^T - y||^2 / ||y||^2` of one linear layer, x [N, T, C], y [N, T, R]."""
    w, inputs, targets = _f64(weight), _f64(x), _f64(y)
    return float(((inputs @ w.T - targets) ** 2).sum() / (targets**2).sum())


def block_tune(
    weight: ArrayLike, keep: np.ndarray, x: ArrayLike, y: ArrayLike, batches: list[list[int]], rate: float
) -> np.ndarray:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101; betas 0.9 and 0.95, no decay) on the kept weights of
    one linear layer.

    Gradient of `||x W^T - y||^2 / ||y||^2` over each batch by hand; rate warmed up over 10 steps and falling
    by half a cosine.
    """
    w, inputs, targets = _f64(weight).copy(), _f64(x), _f64(y)
    first, second = np.zeros(w.shape), np.zeros(w.shape)
    for t, rows in enumerate(batches):
        gradient = np.zeros(w.shape)
        for n in rows:
            for token in range(inputs.shape[1]):
                gradient += 2 * np.outer(w @ inputs[n, token] - targets[n, token], inputs[n, token])
        gradient = gradient / (targets[rows] ** 2).sum() * keep
        first = 0.9 * first + 0.1 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        here = rate * min(1.0, (t + 1) / 10) * 0.5 * (1 + np.cos(np.pi * t / len(batches)))
        w -= here * (first / (1 - 0.9 ** (t + 1))) / (np.sqrt(second / (1 - 0.95 ** (t + 1))) + 1e-12)
        w *= keep
    return w


# --- second-order methods
# ---------------------------------------------------------------------------------------------


def ria_score(weight: ArrayLike, second_moment: ArrayLike, power: float = 0.5) -> np.ndarray:
    """(|W_ij| / sum of row i + |W_ij| / sum of column j) * sqrt(m2_j)^power (RIA, ICLR 2024)."""
    w, m2 = np.abs(_f64(weight)), _f64(second_moment)
    score = np.zeros(w.shape)
    for i in range(w.shape[0]):
        for j in range(w.shape[1]):
            score[i, j] = (w[i, j] / w[i].sum() + w[i, j] / w[:, j].sum()) * np.sqrt(m2[j]) ** power
    return score


def sparsegpt_saliency_score(weight: ArrayLike, gram: ArrayLike, damp: float = 0.01) -> np.ndarray:
    """W_ij^2 / U_jj^2, U the upper Cholesky factor of the inverse damped Gram matrix (SparseGPT, arXiv
    2301.00774).
    """
    w, g = _live_and_damped(weight, gram, damp)
    u = np.linalg.cholesky(np.linalg.inv(g)).T
    return w**2 / np.diag(u) ** 2


def least_squares(weight: ArrayLike, keep: ArrayLike, gram: ArrayLike, damp: float = 0.01) -> np.ndarray:
    """Per row the v on the mask that minimises (w - v)^T A (w - v), A the damped Gram matrix, by the normal
    equations.
    """
    _, a = _live_and_damped(weight, gram, damp)
    w, mask = _f64(weight), np.asarray(keep, dtype=bool)
    out = np.zeros(w.shape)
    for i in range(w.shape[0]):
        s = np.flatnonzero(mask[i])
        out[i, s] = np.linalg.solve(a[np.ix_(s, s)], (a @ w[i])[s])
    return out


def obs(weight: ArrayLike, keep: ArrayLike, gram: ArrayLike, damp: float = 0.01) -> np.ndarray:
    """The update of SparseGPT for a given mask, by elimination; dead columns are zero."""
    return sparsegpt_elimination(weight, gram, keep, damp)


def row_loss(weight: ArrayLike, pruned: ArrayLike, gram: ArrayLike) -> np.ndarray:
    """d^T G d of every row, d = w - v, [R]."""
    d = _f64(weight) - _f64(pruned)
    return np.array([row @ _f64(gram) @ row for row in d])


def swaps(
    weight: ArrayLike, start: ArrayLike, keep: ArrayLike, gram: ArrayLike, width: int = 1, least: float = 1e-5
) -> np.ndarray:
    """Mask [R, C] after exact pair swaps, every loss computed anew from d^T G d; `start` [R, C] are the
    pruned weights.

    Candidates of a step: the best j to grow alone with the best partner, and the best i to prune alone with
    the best partner; for groups of `width` the pair comes from the group whose best j and best i are best
    together.
    """
    w, g = _f64(weight), _f64(gram)
    v, mask = _f64(start).copy(), np.asarray(keep, dtype=bool).copy()
    for r in range(w.shape[0]):

        def loss(grown: int | None, dropped: int | None, r: int = r) -> float:
            new = v[r].copy()
            if grown is not None:
                new[grown] = w[r, grown]
            if dropped is not None:
                new[dropped] = 0.0
            d = w[r] - new
            return float(d @ g @ d)

        first = loss(None, None)
        for _ in range(10 * w.shape[1]):
            now = loss(None, None)
            groups = (
                [range(w.shape[1])]
                if width == 1
                else [range(a, a + width) for a in range(0, w.shape[1], width)]
            )
            pairs = []
            for columns in groups:
                pruned, kept = [j for j in columns if not mask[r, j]], [i for i in columns if mask[r, i]]
                if pruned and kept:
                    j, i = min(pruned, key=lambda j: loss(j, None)), min(kept, key=lambda i: loss(None, i))
                    pairs.append((loss(j, None) + loss(None, i), j, i, pruned, kept))
            if not pairs:
                break
            _, j, i, pruned, kept = min(pairs)
            choices = [(j, min(kept, key=lambda i: loss(j, i))), (min(pruned, key=lambda j: loss(j, i)), i)]
            grown, dropped = min(choices, key=lambda pair: loss(*pair))
            if not loss(grown, dropped) - now < -least * first:
                break
            v[r, grown], v[r, dropped] = w[r, grown], 0.0
            mask[r, grown], mask[r, dropped] = True, False
    return mask


def alps(
    weight: ArrayLike, gram: ArrayLike, select: Any, damp: float = 0.01, rho: float = 0.1
) -> tuple[np.ndarray, np.ndarray]:
    """ALPS (arXiv 2406.07831): ADMM in coordinates where the Gram matrix has unit diagonal, then the normal
    equations on the support.

    `select(score)` is the keep mask of the pattern. Returns weight and mask.
    """
    w, g = _f64(weight).copy(), _f64(gram)
    dead = np.diag(g) == 0
    s = np.where(dead, 1.0, 1 / np.sqrt(np.where(dead, 1.0, np.diag(g))))
    h = np.diag(s) @ g @ np.diag(s) + np.diag(dead.astype(float)) + damp * np.eye(len(g))
    w[:, dead] = 0.0
    scaled = w / s
    keep = select(np.abs(scaled))
    last, kept = keep, keep.sum()
    sparse, dual = scaled * keep, np.zeros(w.shape)
    for t in range(1, 301):
        free = (scaled @ h - dual + rho * sparse) @ np.linalg.inv(h + rho * np.eye(len(h)))
        keep = select(np.abs(free + dual / rho))
        sparse = (free + dual / rho) * keep
        dual = dual + rho * (free - sparse)
        if t % 3 == 0:
            changed = (keep != last).sum() / 2
            if changed < 1:
                break
            rho *= 1.3 if changed >= 0.1 * kept else 1.2 if changed >= 0.005 * kept else 1.1
            last = keep
    out = np.zeros(w.shape)
    for i in range(w.shape[0]):
        on = np.flatnonzero(keep[i])
        out[i, on] = np.linalg.solve(h[np.ix_(on, on)], (h @ scaled[i])[on])
    return out * s, keep


# --- allocation
# -------------------------------------------------------------------------------------------------------


def erk(shapes: dict[str, tuple[int, int]], sparsity: float) -> dict[str, float]:
    """Sparsity per matrix: density proportional to (R + C) / (R * C), at most 1, found by bisection of the
    factor.
    """
    budget = (1 - sparsity) * sum(r * c for r, c in shapes.values())
    low, high = 0.0, 1e9
    for _ in range(300):
        factor = (low + high) / 2
        kept = sum(min(1.0, factor * (r + c) / (r * c)) * r * c for r, c in shapes.values())
        low, high = (factor, high) if kept < budget else (low, factor)
    return {n: 1 - min(1.0, high * (r + c) / (r * c)) for n, (r, c) in shapes.items()}


def _scaled(values: np.ndarray, limit: float) -> np.ndarray:
    return (values - values.min()) / (values.max() - values.min()) * 2 * limit


def owl(
    blocks: list[list[tuple[np.ndarray, np.ndarray]]],
    sparsity: float,
    outlier: float = 5.0,
    limit: float = 0.08,
) -> list[float]:
    """Sparsity per block (OWL, arXiv 2310.05175); a block is a list of (weight [R, C], second moment [C])."""
    shares = []
    for block in blocks:
        scores = np.concatenate([wanda_score(w, m2).ravel() for w, m2 in block])
        shares.append((scores > outlier * scores.mean()).mean())
    o = _scaled(np.array(shares), limit)
    return [float(1 - (value - o.mean() + (1 - sparsity))) for value in o]


def dlp(
    blocks: list[list[tuple[np.ndarray, np.ndarray]]], sparsity: float, limit: float = 0.15
) -> list[float]:
    """Sparsity per block (DLP, arXiv 2505.23807): keep ratios 1 - score / sum of scores, scaled as OWL's."""
    means = np.array(
        [np.concatenate([wanda_score(w, m2).ravel() for w, m2 in block]).mean() for block in blocks]
    )
    o = _scaled(1 - means / means.sum(), limit)
    return [float(1 - (value - o.mean() + (1 - sparsity))) for value in o]


def fisher(matrices: dict[str, tuple[np.ndarray, np.ndarray]], sparsity: float) -> dict[str, float]:
    """Sparsity per matrix: its share of the weights of all matrices whose w^2 F is smallest; a matrix is a
    weight [R, C] and its squared gradients (the diagonal Fisher matrix, arXiv 1801.05787).
    """
    ranked = sorted(
        (w[i, j] ** 2 * f[i, j], name)
        for name, (w, f) in matrices.items()
        for i in range(w.shape[0])
        for j in range(w.shape[1])
    )
    pruned = [name for _, name in ranked[: int(sparsity * len(ranked))]]
    return {name: pruned.count(name) / w.size for name, (w, _) in matrices.items()}


def kept_in_groups(score: ArrayLike, n: int, m: int) -> float:
    """What N:M pruning keeps of score [R, C]: the n highest of every m columns in a row (channel permutation,
    RIA, ICLR 2024).
    """
    s = _f64(score)
    return float(sum(np.sort(row[a : a + m])[m - n :].sum() for row in s for a in range(0, s.shape[1], m)))


def best_grouping(score: ArrayLike, n: int, m: int) -> float:
    """The most that any two groups of m keep of score [R, 2m], all of them tried."""
    s = _f64(score)
    sides = [(list(a), [j for j in range(2 * m) if j not in a]) for a in combinations(range(2 * m), m)]
    return max(kept_in_groups(s[:, a + b], n, m) for a, b in sides)


def atp(blocks: int, sparsity: float, share: float) -> list[float]:
    """Sparsity per block (ATP, arXiv 2502.14770): an arithmetic progression around S whose step is a share of
    the steepest in [0, 1].
    """
    beta = share * 2 * min(sparsity, 1 - sparsity) / (blocks - 1)
    return [sparsity - beta * (blocks - 1) / 2 + beta * (b - 1) for b in range(1, blocks + 1)]


def explicit(sizes: dict[str, int], fixed: dict[str, float], sparsity: float) -> float:
    """The sparsity left for the matrices that are not fixed."""
    rest = sum(size for name, size in sizes.items() if name not in fixed)
    return (sparsity * sum(sizes.values()) - sum(sizes[n] * s for n, s in fixed.items())) / rest


# --- packed matrices, from the text of the layout
# -------------------------------------------------------------------------------------------------


def packed_parts(dense: np.ndarray, keep: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, mask uint8 [R, 8 ceil(C / 64)] and row starts of a matrix, one entry after another.

    For 4 bits `dense` holds q of -8 to 7, and the values are nibbles q + 8, low nibble first, those of every
    64 columns on bytes of their own.
    """
    rows, columns = dense.shape
    words = -(-columns // 64)
    mask, values, starts = np.zeros((rows, 8 * words), np.uint8), [], [0]
    for r in range(rows):
        kept = 0
        for w in range(words):
            nibbles = []
            for j in range(64 * w, min(64 * w + 64, columns)):
                if keep[r, j]:
                    mask[r, j // 8] |= 1 << (j % 8)
                    nibbles.append(dense[r, j])
            kept += len(nibbles)
            if bits == 4:
                nibbles = [int(q) + 8 for q in nibbles] + [0] * (len(nibbles) % 2)
                nibbles = [low | high << 4 for low, high in zip(nibbles[::2], nibbles[1::2], strict=True)]
            values += nibbles
        starts.append(starts[-1] + kept)
    return np.array(values, np.uint8 if bits == 4 else dense.dtype), mask, np.array(starts)


def packed_product(
    x: np.ndarray, dense: np.ndarray, keep: np.ndarray, scale: np.ndarray | None
) -> np.ndarray:
    """y [n, R] = x [n, C] W^T, w = kept q times the scale [R, ceil(C / 128)] of its columns, in float64."""
    y = np.zeros((len(x), len(dense)))
    for r in range(len(dense)):
        for j in range(dense.shape[1]):
            if keep[r, j]:
                weight = float(dense[r, j]) * (1.0 if scale is None else float(scale[r, j // 128]))
                y[:, r] += _f64(x[:, j]) * weight
    return y


# --- rounding
# -------------------------------------------------------------------------------------------------


def bfloat16(value: float) -> float:
    """The nearest bfloat16, ties to even: 8 significant bits."""
    if value == 0:
        return 0.0
    exponent = np.floor(np.log2(abs(value)))
    unit = 2.0 ** (exponent - 7)
    return float(np.round(np.float32(value) / unit) * unit)


def nearest_on_grid(value: float, scale: float, bits: int) -> float:
    """The nearest of q x scale with a whole q from -(2^(bits-1) - 1) to 2^(bits-1) - 1."""
    most = 2 ** (bits - 1) - 1
    return min((q * scale for q in range(-most, most + 1)), key=lambda v: abs(v - value))


def rounding_scale(group: ArrayLike, bits: int, importance: ArrayLike, least: float) -> float:
    """Of the shares 1, 0.95, ... `least` of the scale that cuts nothing off, the one with the least weighted
    squared error.
    """
    most, best, chosen = max(abs(v) for v in _f64(group)) / (2 ** (bits - 1) - 1), np.inf, 0.0
    for step in range(round((1 - least) / 0.05) + 1):
        scale = bfloat16(most * (1 - 0.05 * step))
        error = sum(
            i * (nearest_on_grid(v, scale, bits) - v) ** 2
            for v, i in zip(_f64(group), _f64(importance), strict=True)
        )
        if error < best:
            best, chosen = error, scale
    return chosen


def rounding(weight: ArrayLike, keep: np.ndarray, gram: ArrayLike, scale: ArrayLike, bits: int) -> np.ndarray:
    """GPTQ on a mask, from the formula of optimal brain surgery: column j becomes its nearest value, and the
    columns behind it move by `-(w_j - q_j) [H_F^-1]_j / [H_F^-1]_jj`, H_F the damped Gram matrix of the
    columns from j on. `scale` [R, C] is that of every weight.
    """
    w, g = _f64(weight).copy(), _f64(gram).copy()
    for j in range(len(g)):
        g[j, j] = g[j, j] or 1.0
    h = g + 0.01 * np.mean(np.diag(g)) * np.eye(len(g))
    for j in range(w.shape[1]):
        inverse = np.linalg.inv(h[j:, j:])
        for r in range(len(w)):
            value = nearest_on_grid(w[r, j], scale[r, j], bits) if keep[r, j] else 0.0
            error = w[r, j] - value
            w[r, j:] -= error * inverse[0] / inverse[0, 0]
            w[r, j] = value
    return w


def rounding_descent(
    weight: ArrayLike,
    start: np.ndarray,
    keep: np.ndarray,
    gram: ArrayLike,
    scale: ArrayLike,
    bits: int,
    passes: int,
) -> np.ndarray:
    """QuantEase on a mask: each kept weight in turn takes the best value of its grid, the others stay."""
    w, v, g = _f64(weight), start.copy(), _f64(gram).copy()
    for j in range(len(g)):
        g[j, j] = g[j, j] or 1.0
    h = g + 0.01 * np.mean(np.diag(g)) * np.eye(len(g))
    for _ in range(passes):
        for j in range(w.shape[1]):
            for r in range(len(w)):
                if keep[r, j]:
                    others = sum(h[j, k] * (w[r, k] - v[r, k]) for k in range(w.shape[1]) if k != j)
                    v[r, j] = nearest_on_grid(w[r, j] + others / h[j, j], scale[r, j], bits)
    return v


def block_tune_rounded(
    weight: ArrayLike,
    keep: np.ndarray,
    scale: ArrayLike,
    x: ArrayLike,
    y: ArrayLike,
    batches: list[list[int]],
    rates: tuple[float, float],
    bits: int,
) -> tuple[np.ndarray, np.ndarray]:
    """AdamW on the weights of a layer that computes with rounded ones, and on the logarithms of the scales.

    The scale [R] is one for each row. The gradient of a rounded weight goes to the weight itself where it is
    not cut off, and to the scale with the factor q - w / s, or q where it is cut off (LSQ). Rates: of the
    weights and of the logarithms. Returns the rounded weights and their scales.
    """
    w, s0, inputs, targets = _f64(weight).copy(), _f64(scale), _f64(x), _f64(y)
    most = 2 ** (bits - 1) - 1
    log = np.zeros(len(w))
    moments = [np.zeros(w.shape), np.zeros(w.shape), np.zeros(len(w)), np.zeros(len(w))]

    def now() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        s = np.array([bfloat16(v) for v in s0 * np.exp(log)])
        exact = w / s[:, None]
        return s, exact, np.clip(np.round(exact), -most, most)

    for t, rows in enumerate(batches):
        s, exact, codes = now()
        gradient = np.zeros(w.shape)
        for n in rows:
            for token in range(inputs.shape[1]):
                out = (codes * s[:, None]) @ inputs[n, token]
                gradient += 2 * np.outer(out - targets[n, token], inputs[n, token])
        gradient /= (targets[rows] ** 2).sum()
        inside = abs(exact) <= most
        of_scale = (gradient * np.where(inside, codes - exact, codes)).sum(1) * s0 * np.exp(log)
        here = min(1.0, (t + 1) / 10) * 0.5 * (1 + np.cos(np.pi * t / len(batches)))
        for number, (value, slope, rate) in enumerate(
            ((w, gradient * inside, rates[0]), (log, of_scale, rates[1]))
        ):
            first, second = moments[2 * number : 2 * number + 2]
            first[:] = 0.9 * first + 0.1 * slope
            second[:] = 0.95 * second + 0.05 * slope**2
            step = (first / (1 - 0.9 ** (t + 1))) / (np.sqrt(second / (1 - 0.95 ** (t + 1))) + 1e-12)
            value -= here * rate * step
        w *= keep
    s, _, codes = now()
    return codes * s[:, None], s
