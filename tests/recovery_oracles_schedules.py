"""Slow, independent reference versions of what schedules decide in training with sparsity.

`progress` is the share of the steps done, t / T. It may be a Fraction, as may the bounds: then phases begin
exactly where they should. `steps` counts steps from where a ramp begins.
"""

from __future__ import annotations

import math
from fractions import Fraction

Share = float | Fraction


def within(progress: Share, first: Share, last: Share) -> float:
    """How far progress is on the way from first to last, from 0 to 1."""
    return float(min(max((progress - first) / (last - first), 0), 1))


def linear(progress: Share, start: float, end: float, first: Share = 0, last: Share = 1) -> float:
    """From start to end between first and last; constant before and after. MaskLLM's kappa and tau."""
    return start + (end - start) * within(progress, first, last)


def cubic(progress: Share, start: float, end: float, first: Share = 0, last: Share = 1) -> float:
    """s_f + (s_i - s_f) (1 - x)^3, x from 0 at `first` to 1 at `last`; `start` before and `end` itself after
    (GMP, arXiv 1710.01878).
    """
    if progress >= last:
        return end
    return end + (start - end) * (1 - within(progress, first, last)) ** 3


def losa_sparsity(round_: int, rounds: int, sparsity: float) -> float:
    """s (1 - (1 - i / n)^3) in round i = 1, ..., n (LoSA, arXiv 2502.14816); the last one is s itself."""
    return sparsity if round_ == rounds else sparsity * (1 - (1 - round_ / rounds) ** 3)


def acdc_dense(
    progress: Share, warm_up: Share, length: Share, last_dense: Share, last_compressed: Share
) -> bool:
    """Whether AC/DC (arXiv 2106.12379) is dense: dense before `warm_up`, then phases of `length` that begin
    compressed, dense from `last_dense`, compressed from `last_compressed` on.
    """
    if progress < warm_up or last_dense <= progress < last_compressed:
        return True
    if progress >= last_compressed:
        return False
    return (progress - warm_up) // length % 2 == 1


def gap_part(progress: Share, parts: int, frames: int, last: Share) -> int | None:
    """The dense part of Grow-and-Prune (arXiv 2106.09857): `frames` equal frames up to `last`, frame i has
    part i mod `parts`; None from `last` on, when all parts are sparse.
    """
    return None if progress >= last else int(progress * frames // last) % parts


def sdgf_ladder(n: int, m: int) -> list[tuple[int, int]]:
    """M-1:M, M/2:M, M/4:M, ..., N:M (arXiv 2402.04744), m a power of 2 times n."""
    rungs, kept = [(m - 1, m)], m // 2
    while kept >= n:
        rungs += [(kept, m)] if kept < m - 1 else []
        kept //= 2
    assert rungs[-1] == (n, m), f"{m} is not a power of 2 times {n}"
    return rungs


def sdgf_wide_ladder(n: int, m: int, factor: int = 8) -> list[tuple[int, int]]:
    """8N:8M, 4N:4M, 2N:2M, N:M (arXiv 2402.04744): equal sparsity, narrower groups."""
    rungs = [(factor * n, factor * m)]
    while factor > 1:
        factor //= 2
        rungs.append((factor * n, factor * m))
    return rungs


def rung(progress: Share, rungs: list[tuple[int, int]], last: Share = 1) -> tuple[int, int]:
    """The (n, m) of a ladder in equal frames up to `last`, its end after that."""
    return rungs[min(int(progress * len(rungs) // last), len(rungs) - 1)]


def drop_share(progress: Share, share: float, last: Share, shape: str = "cosine") -> float:
    """The share f_t that drops: 'cosine' share / 2 (1 + cos(pi x)) with x = progress / last, or 'constant'; 0
    from `last` on (RigL, arXiv 1911.11134; ITOP, arXiv 2102.02887).
    """
    if progress >= last:
        return 0.0
    if shape == "constant":
        return share
    return share / 2 * (1 + math.cos(math.pi * float(progress / last)))


def beta(steps: int, c: float, shape: str = "linear") -> float:
    """MdGF (arXiv 2402.04744): max(0, 1 - c n) or exp(-c n), n steps after the dense warm-up; 1 before."""
    n = max(steps, 0)
    return max(0.0, 1 - c * n) if shape == "linear" else math.exp(-c * n)


def pull(steps: int, strength: float, ramp: int) -> float:
    """Lambda of AST (arXiv 2407.20584): from 0 linearly to `strength` over `ramp` steps."""
    return strength * min(1.0, steps / ramp)


def rate(progress: Share, peak: float, warm_up: Share, floor: float = 0.0, shape: str = "cosine") -> float:
    """The learning rate: peak * progress / warm_up in the warm-up, then 'cosine' or 'linear' from peak to
    floor at progress 1.
    """
    if progress < warm_up:
        return peak * float(progress / warm_up)
    x = float((progress - warm_up) / (1 - warm_up)) if warm_up < 1 else 0.0
    left = 1 - x if shape == "linear" else 0.5 * (1 + math.cos(math.pi * x))
    return floor + (peak - floor) * left
