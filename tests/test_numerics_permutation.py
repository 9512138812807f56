"""Orders of columns against brute force."""

from itertools import permutations

import numpy as np
import oracles
import pytest
import torch

from llmprune.numerics.permutation import _assigned, column_order, kept_score


def skewed(rows, columns, seed=0):
    """Scores whose columns differ much, as those of a model do."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, columns, generator=generator) ** 3 * torch.rand(columns, generator=generator) ** 2


@pytest.mark.parametrize(("n", "m", "place"), [(2, 4, 0), (2, 4, 3), (1, 4, 1), (5, 8, 2)])
def test_sharing_out_one_place_is_the_best_of_all_ways(n, m, place):
    score = skewed(6, 4 * m)
    groups = torch.randperm(4 * m, generator=torch.Generator().manual_seed(1)).view(4, m)
    chosen = groups.clone()
    chosen[:, place] = _assigned(score, groups, place, n)
    best = 0.0
    for way in permutations(range(4)):
        tried = groups.clone()
        tried[:, place] = groups[list(way), place]
        best = max(best, oracles.kept_in_groups(score.numpy()[:, tried.view(-1)], n, m))
    assert oracles.kept_in_groups(score.numpy()[:, chosen.view(-1)], n, m) == pytest.approx(best)
    assert sorted(chosen.view(-1).tolist()) == list(range(4 * m))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4)])
def test_the_order_comes_near_the_best_of_all_groupings(n, m):
    reached = []
    for seed in range(12):
        score = skewed(5, 8, seed)
        order = column_order(score, n, m, torch.Generator().manual_seed(0))
        assert sorted(order.tolist()) == list(range(8))
        before, best = oracles.kept_in_groups(score.numpy(), n, m), oracles.best_grouping(score.numpy(), n, m)
        kept = oracles.kept_in_groups(score.numpy()[:, order], n, m)
        assert kept == pytest.approx(kept_score(score[:, order], n, m)) and kept >= before - 1e-6
        reached.append((kept - before) / (best - before) if best > before else 1.0)
    assert np.mean(reached) > 0.85


def test_a_good_order_stays():
    score = torch.tensor([[9.0, 9, 0, 0, 9, 9, 0, 0]])
    assert column_order(score, 2, 4, torch.Generator().manual_seed(0)).tolist() == list(range(8))
    assert column_order(score[:, :4], 2, 4, torch.Generator().manual_seed(0)).tolist() == list(range(4))
