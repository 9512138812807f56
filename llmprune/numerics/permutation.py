"""Channel permutation (Zhang et al., ICLR 2024, with RIA): an order of columns so that N:M keeps more score.

R rows, C columns in G = C / M groups. First the columns are distributed so that every group gets large and
small ones. Then, repeatedly, each group gives one column away, and solving a linear assignment problem
distributes these columns anew, so that the kept score never falls.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 5  # how often the column at every position of a group is given away
# At most so many rows and groups enter one assignment, whose cost grows as rows * groups^2.
_ROWS = 1024
_GROUPS = 512


def kept_score(score: Tensor, n: int, m: int) -> float:
    """The sum, over all rows of the score [R, C], of the n highest entries of every group of m columns."""
    return float(score.view(score.shape[0], -1, m).topk(n, dim=2).values.sum(dtype=torch.float64))


def column_order(score: Tensor, n: int, m: int, generator: torch.Generator) -> Tensor:
    """Indices [C] that reorder the columns of a score [R, C] so that groups of m keep more of it.

    They are the identity where no better order was found.
    """
    columns = torch.arange(score.shape[1], device=score.device)
    if score.shape[1] <= m or n >= m:
        return columns
    sampled = score[torch.linspace(0, len(score) - 1, min(len(score), _ROWS), dtype=torch.float32).long()]
    groups = _distributed(sampled.sum(0), m)
    for _ in range(_ROUNDS):
        # Only columns at the same position of their groups can be exchanged, so each group is shuffled first.
        noise = torch.rand(groups.shape, generator=generator, dtype=torch.float32)
        groups = groups.gather(1, noise.argsort(1).to(groups.device))
        for position in range(m):
            for part in torch.randperm(len(groups), generator=generator).to(groups.device).split(_GROUPS):
                groups[part, position] = _assigned(sampled, groups[part], position, n)
    order = groups.sort(1).values.reshape(-1)
    return order if kept_score(score[:, order], n, m) > kept_score(score, n, m) else columns


def _distributed(sums: Tensor, m: int) -> Tensor:
    """Groups [G, m] of columns with similar sums: the columns, largest first, go to the groups in turn.

    After each column for the last group the order of the groups is reversed.
    """
    ranks = sums.argsort(descending=True).view(m, -1)
    ranks[1::2] = ranks[1::2].flip(1)
    return ranks.T.contiguous()


def _assigned(score: Tensor, groups: Tensor, position: int, n: int) -> Tensor:
    """The columns at one position of some groups [G, m], exchanged so that the groups keep the most score."""
    from scipy.optimize import linear_sum_assignment

    given = groups[:, position]
    stay = torch.cat([groups[:, :position], groups[:, position + 1 :]], dim=1)
    # A row of a group keeps the n - 1 highest of the columns
    # that stay, and the larger of their n-th and the new column.
    rivals = score[:, stay].topk(n, dim=2).values[:, :, n - 1]
    offered = score[:, given]
    gain = torch.stack([torch.maximum(rivals[:, g : g + 1], offered).sum(0) for g in range(len(groups))])
    _, chosen = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
    return given[torch.from_numpy(chosen).to(given.device)]
