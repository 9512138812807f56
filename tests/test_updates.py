"""Updates of the kept weights against their oracles."""

import numpy as np
import oracles
import pytest
import torch
from jobs import PATTERNS, array, build, layer


@pytest.mark.parametrize("pattern", PATTERNS)
def test_least_squares_equals_the_normal_equations(pattern):
    work = layer(pattern)
    start = build("pruners", "wanda").prune(work)
    out = build("updates", "least-squares", iterations=200).apply(work, start)
    wanted = oracles.least_squares(array(work.weight), start.keep.numpy(), array(work.stats.gram))
    assert np.allclose(array(out.weight), wanted, atol=2e-3)
    few = build("updates", "least-squares", iterations=3).apply(work, start)
    losses = [
        oracles.row_loss(array(work.weight), array(p.weight), array(work.stats.gram)).sum()
        for p in (start, few, out)
    ]
    assert losses[0] > losses[1] > losses[2] * 0.999


def test_obs_equals_elimination_and_sparsegpt():
    work = layer("matrix")
    pruned = build("pruners", "sparsegpt").prune(work)
    out = build("updates", "obs", block=8).apply(work, pruned)
    assert torch.allclose(out.weight, pruned.weight, atol=1e-4), (
        "with SparseGPT's own mask these are SparseGPT's weights"
    )
    assert np.allclose(
        array(out.weight),
        oracles.obs(array(work.weight), pruned.keep.numpy(), array(work.stats.gram)),
        atol=1e-3,
    )
