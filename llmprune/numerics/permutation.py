"""Channel permutation (Zhang et al., ICLR 2024, with RIA): an order of the columns in which N:M groups keep more of the score.

R rows, C columns in G = C / M groups. First the columns are dealt out so that every group gets large and small ones; then, again and
again, each group gives one column away and a linear assignment shares them out anew, so the score kept never falls.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 5  # times that every place of a group is given away
_ROWS, _GROUPS = (
    1024,
    512,
)  # at most so many rows and groups are weighed against one another: the cost is rows * groups^2


def kept_score(score: Tensor, n: int, m: int) -> float:
    """The sum of the n highest entries of every group of m columns, of all rows of score [R, C]."""
    return float(score.view(score.shape[0], -1, m).topk(n, dim=2).values.sum(dtype=torch.float64))


def column_order(score: Tensor, n: int, m: int, generator: torch.Generator) -> Tensor:
    """Indices [C] that put the columns of score [R, C] into groups of m which keep more of it; never less than as they are."""
    columns = torch.arange(score.shape[1], device=score.device)
    if score.shape[1] <= m or n >= m:
        return columns
    sampled = score[torch.linspace(0, len(score) - 1, min(len(score), _ROWS), dtype=torch.float32).long()]
    groups = _dealt(sampled.sum(0), m)
    for _ in range(_ROUNDS):
        # Columns at the same place of their groups change places: mixed anew, any two may meet.
        groups = groups.gather(
            1, torch.rand(groups.shape, generator=generator, dtype=torch.float32).argsort(1).to(groups.device)
        )
        for place in range(m):
            for part in torch.randperm(len(groups), generator=generator).to(groups.device).split(_GROUPS):
                groups[part, place] = _assigned(sampled, groups[part], place, n)
    order = groups.sort(1).values.reshape(-1)
    return order if kept_score(score[:, order], n, m) > kept_score(score, n, m) else columns


def _dealt(sums: Tensor, m: int) -> Tensor:
    """Groups [G, m] of the columns in descending order, dealt out back and forth."""
    ranks = sums.argsort(descending=True).view(m, -1)
    ranks[1::2] = ranks[1::2].flip(1)
    return ranks.T.contiguous()


def _assigned(score: Tensor, groups: Tensor, place: int, n: int) -> Tensor:
    """The columns at one place of some groups [G, m], shared out anew so that the score kept is highest."""
    from scipy.optimize import linear_sum_assignment

    given = groups[:, place]
    stay = torch.cat([groups[:, :place], groups[:, place + 1 :]], dim=1)
    # With the others fixed, a row of the group keeps their n - 1 highest and the larger of their n-th and the newcomer.
    rivals = score[:, stay].topk(n, dim=2).values[:, :, n - 1]
    offered = score[:, given]
    gain = torch.stack([torch.maximum(rivals[:, g : g + 1], offered).sum(0) for g in range(len(groups))])
    _, chosen = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
    return given[torch.from_numpy(chosen).to(given.device)]
