"""Input statistics and the error measured with them against their oracles."""

import numpy as np
import oracles
import pytest
import torch
from jobs import ALL, array, build, inputs, job, statistics

from llmprune.contracts import InputStats, Need
from llmprune.patterns import Unstructured
from llmprune.statistics.sums import PublishedSums, StatsSums, relative_error, sample_positions


def test_statistics_equal_the_oracle_and_do_not_depend_on_batches():
    x = inputs(10)
    stats, wanted = statistics(x), oracles.input_statistics([array(s) for s in x])
    for name in ("mean", "second_moment", "variance", "within_variance", "gram"):
        assert np.allclose(array(getattr(stats, name)), wanted[name], rtol=1e-5, atol=1e-6), name
    sums = StatsSums(ALL, sample_positions(6, 20, 0, 64))
    for n in range(6):
        sums.add(x[n : n + 1], n)
    one_by_one = sums.result()
    assert torch.equal(one_by_one.sample, stats.sample)
    assert torch.allclose(one_by_one.gram, stats.gram, rtol=1e-5)


def test_published_sums_equal_the_oracle_and_do_not_depend_on_batches():
    x = inputs(10)
    wanted = oracles.published_sums([array(sequence) for sequence in x])
    length = x.shape[1]
    together, one_by_one = (PublishedSums(ALL, sample_positions(6, 20, 0, 64)) for _ in range(2))
    together.add(x, 0)
    for n in range(len(x)):
        one_by_one.add(x[n : n + 1], n)
    stats = together.result()
    expected = {
        "mean": wanted["sum"] / length,
        "second_moment": wanted["squares"] / length,
        "within_variance": wanted["variance"],
        "gram": wanted["gram"],
    }
    for name, value in expected.items():
        assert np.allclose(array(getattr(stats, name)), value, rtol=1e-5, atol=1e-6), name
        assert torch.equal(getattr(stats, name), getattr(one_by_one.result(), name)), name
    assert torch.equal(stats.sample, statistics(x).sample)
    assert torch.allclose(stats.variance, statistics(x).variance)
    assert together.finite and not PublishedSums.finite.fget(_with_an_infinity(x))


def _with_an_infinity(x):
    sums = PublishedSums(Need.GRAM, sample_positions(6, 20, 0, 64))
    x = x.clone()
    x[0, 0, 0] = float("inf")
    sums.add(x, 0)
    return sums


def test_a_large_mean_does_not_drown_the_variance():
    x = torch.randn(4, 50, 3, generator=torch.Generator().manual_seed(0)) * 1e-2 + 100
    wanted = oracles.input_statistics([array(s) for s in x])
    assert np.allclose(array(statistics(x).variance), wanted["variance"], rtol=2e-2)
    assert np.allclose(array(statistics(x).within_variance), wanted["within_variance"], rtol=2e-2)


def test_samples_are_drawn_evenly_over_the_sequences():
    positions = sample_positions(5, 30, 7, size=12)
    assert len(positions) == 12 and len({tuple(p) for p in positions.tolist()}) == 12
    assert positions[:, 0].bincount(minlength=5).tolist() in (
        [2, 2, 3, 2, 3],
        [2, 3, 2, 3, 2],
        [2, 2, 2, 3, 3],
    )
    assert not torch.equal(positions, sample_positions(5, 30, 8, size=12))
    assert len(sample_positions(2, 3, 0, size=1024)) == 6


def test_an_undeclared_statistic_cannot_be_read():
    stats = InputStats(4, 2, {Need.MEAN: torch.zeros(3)})
    with pytest.raises(LookupError, match="SECOND_MOMENT"):
        stats.second_moment  # noqa: B018


def test_relative_error_equals_the_oracle():
    x = inputs(32)
    task = job(Unstructured("row"), 0.5, x=x)
    out = build("pruners", "wanda").prune(task)
    wanted = oracles.relative_error(task.weight, out.weight, x.reshape(-1, 32))
    assert relative_error(task.weight, out.weight, task.stats) == pytest.approx(wanted, rel=1e-4)
    sampled = statistics(x, Need.SAMPLE, size=120)
    assert relative_error(task.weight, out.weight, sampled) == pytest.approx(
        oracles.relative_error(task.weight, out.weight, x.reshape(-1, 32)[::4]), rel=1e-4
    )
