"""Corrections towards the dense model's inputs."""

import numpy as np
import pytest
from jobs import array, inputs, job, statistics

from llmprune import registry
from llmprune.contracts import InputStats, Job, Need
from llmprune.patterns import Unstructured
from llmprune.statistics.sums import StatsSums, sample_positions


def cross_stats(x, dense):
    sums = StatsSums(Need.GRAM | Need.CROSS, sample_positions(x.shape[0], x.shape[1], 0))
    for n in range(len(x)):
        sums.add(x[n : n + 1], n)
        sums.add_dense(dense[n : n + 1])
    return sums.result()


def test_the_cross_gram_matrix_is_what_it_says():
    x, dense = inputs(8, seed=1), inputs(8, seed=2)
    wanted = array(dense).reshape(-1, 8).T @ array(x).reshape(-1, 8) / (x.shape[0] * x.shape[1])
    assert np.allclose(array(cross_stats(x, dense).cross), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("room", "name"), [("pruners", "alps"), ("updates", "least-squares"), ("refiners", "swaps")]
)
def test_a_corrected_layer_is_nearer_to_the_dense_outputs(room, name):
    clean = inputs(24, sequences=20)
    x = clean + 0.5 * clean.roll(1, dims=-1)
    both = cross_stats(x, clean)
    task = job(Unstructured("row"), 0.5, rows=10, columns=24, x=x)
    values = {
        need: getattr(task.stats, need.name.lower()) for need in (Need.MEAN, Need.SECOND_MOMENT, Need.GRAM)
    }
    stats = InputStats(task.stats.count, task.stats.sequence_length, values | {Need.CROSS: both.cross})
    task = Job(task.name, task.weight, stats, task.pattern, task.sparsity, task.generator)
    start = registry.build("pruners", "wanda", {}).prune(task)

    def error(correction):
        algorithm = registry.build(room, name, {"correction": correction})
        out = algorithm.prune(task) if room == "pruners" else algorithm.apply(task, start)
        return float((clean @ task.weight.T - x @ out.weight.T).square().sum())

    assert Need.CROSS in registry.build(room, name, {"correction": 0.5}).needs
    assert error(1.0) < error(0.5) < error(0.0)


def test_without_cross_terms_nothing_needs_them():
    assert statistics(inputs(8), Need.GRAM).needs == Need.GRAM
    assert all(
        Need.CROSS not in registry.build("pruners", name, {}).needs for name in registry.names("pruners")
    )
