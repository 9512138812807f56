"""Every algorithm against its oracle, written independently from the paper's formula."""

import numpy as np
import oracles
import pytest
import torch
from jobs import ALL, array, inputs, job, statistics

from llmprune import registry
from llmprune.contracts import InputStats, Job, Need, Pruned
from llmprune.patterns import NM, Unstructured
from llmprune.statistics.sums import StatsSums, relative_error, sample_positions


def build(room, name, **options):
    return registry.build(room, name, options)


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


@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("name", ["magnitude", "wanda"])
def test_score_pruners_equal_the_oracle(name, scope):
    task = job(Unstructured(scope), 0.6)
    score = oracles.magnitude_score(array(task.weight))
    if name == "wanda":
        score = oracles.wanda_score(array(task.weight), array(task.stats.second_moment))
    out = build("pruners", name).prune(task)
    assert np.array_equal(out.keep.numpy(), oracles.unstructured_mask(score, 0.6, scope))
    assert torch.equal(out.weight, task.weight * out.keep)


def test_random_depends_on_the_seed_alone():
    first, again, other = (
        build("pruners", "random").prune(job(Unstructured(), 0.5, seed=s)).keep for s in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def sparsegpt_agrees(task: Job, **oracle):
    out = build("pruners", "sparsegpt", block=16).prune(task)
    weight, keep = oracles.sparsegpt(array(task.weight), array(task.stats.gram), block=16, **oracle)
    assert np.array_equal(out.keep.numpy(), keep)
    assert np.allclose(array(out.weight), weight, atol=2e-3 * np.abs(weight).max())
    again = oracles.sparsegpt_elimination(array(task.weight), array(task.stats.gram), keep)
    assert np.allclose(array(out.weight), again, atol=2e-3 * np.abs(weight).max())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_sparsegpt_equals_the_oracle_and_textbook_elimination(scope, seed):
    sparsegpt_agrees(job(Unstructured(scope), 0.55, columns=40, seed=seed), sparsity=0.55, scope=scope)


@pytest.mark.parametrize("nm", [(2, 4), (4, 8), (1, 2)])
def test_sparsegpt_n_m_equals_the_oracle(nm):
    sparsegpt_agrees(job(NM(*nm), 1 - nm[0] / nm[1]), n=nm[0], m=nm[1])


def test_sparsegpt_handles_dead_features_and_fewer_tokens_than_features():
    x = inputs(48, sequences=2, tokens=8)
    x[..., 5] = 0
    task = job(Unstructured("matrix"), 0.5, columns=48, x=x)
    out = build("pruners", "sparsegpt").prune(task)
    assert bool((out.weight[:, 5] == 0).all()) and bool(out.weight.isfinite().all())


def test_sparsegpt_lowers_the_layer_error():
    task = job(Unstructured("matrix"), 0.5, rows=40, columns=64)
    pruned = {n: build("pruners", n).prune(task).weight for n in ("magnitude", "wanda", "sparsegpt")}
    error = {n: relative_error(task.weight, weight, task.stats) for n, weight in pruned.items()}
    assert error["sparsegpt"] < error["wanda"] < error["magnitude"]


def test_a_gram_matrix_that_cannot_be_factored_names_the_matrix():
    task = job(Unstructured("matrix"), 0.5)
    broken = InputStats(10, 5, {Need.GRAM: -torch.eye(32)})
    with pytest.raises(ValueError, match=r"of layer .*asked: 0.01"):
        build("pruners", "sparsegpt").prune(
            Job("layer", task.weight, broken, task.pattern, 0.5, task.generator)
        )


def refined(task: Job, keep, score, **options):
    """The refiner's mask, and what the oracle is given beside the weights and the first mask."""
    start = Pruned(task.weight * keep, keep, score)
    out = build("refiners", "dsnot", **options).apply(task, start)
    assert torch.equal(out.weight, task.weight * out.keep)
    task.pattern.check(out.keep, task.sparsity)
    return out.keep.numpy()


def start_of(task: Job):
    wanda = task.weight.abs() * task.stats.second_moment.sqrt()
    return task.pattern.select(wanda, task.sparsity), wanda


@pytest.mark.parametrize("variance", ["within", "total"])
@pytest.mark.parametrize("walk_on", [False, True])
@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.9])
def test_dsnot_equals_the_oracle(sparsity, walk_on, variance):
    task = job(Unstructured("row"), sparsity, rows=60, columns=64)
    keep, wanda = start_of(task)
    spread = task.stats.within_variance if variance == "within" else task.stats.variance
    got = refined(task, keep, wanda, share=1.0, verified=False, walk_on=walk_on, variance=variance)
    wanted = oracles.dsnot(task.weight, keep, task.stats.mean, spread, wanda, 20, walk_on=walk_on)
    assert np.array_equal(got, wanted)
    assert not np.array_equal(got, keep.numpy())


@pytest.mark.parametrize("nm", [(2, 4), (4, 8), (1, 4)])
def test_dsnot_n_m_equals_the_oracle(nm):
    task = job(NM(*nm), 1 - nm[0] / nm[1], rows=40, columns=64)
    keep, wanda = start_of(task)
    stats = task.stats
    got = refined(task, keep, wanda, share=1.0, verified=False)
    assert np.array_equal(
        got, oracles.dsnot(task.weight, keep, stats.mean, stats.within_variance, wanda, 20, nm, wanda)
    )


@pytest.mark.parametrize("margin", [0.0, 0.15])
@pytest.mark.parametrize("pattern", [Unstructured("row"), NM(2, 4)], ids=str)
def test_verified_dsnot_equals_the_oracle_and_never_raises_the_sampled_error(pattern, margin):
    task = job(pattern, 0.5, rows=60, columns=64)
    keep, wanda = start_of(task)
    stats = task.stats
    got = refined(task, keep, wanda, share=1.0, max_cycles=9, margin=margin)
    nm = (2, 4) if isinstance(pattern, NM) else None
    wanted = oracles.dsnot_safe(
        task.weight,
        keep,
        stats.mean,
        stats.within_variance,
        wanda,
        20,
        stats.sample,
        nm,
        wanda if nm else None,
        max_cycles=9,
        margin=margin,
    )
    assert (got != wanted).sum() <= 2  # two masks of a row may tie within rounding
    before, after = (
        ((task.weight * ~m) @ stats.sample.T).square().sum(1) for m in (keep, torch.from_numpy(got))
    )
    assert bool((after <= before * 1.0001).all())
    assert margin or after.sum() < before.sum()


@pytest.mark.parametrize("start", ["random", "magnitude", "sparsegpt"])
@pytest.mark.parametrize(
    "pattern", [Unstructured("matrix"), Unstructured("row"), NM(2, 4)], ids=["matrix", "row", "2:4"]
)
def test_dsnot_keeps_pattern_and_count_from_any_first_mask(pattern, start):
    task = job(pattern, 0.5, rows=24, columns=64)
    pruned = build("pruners", start).prune(task)
    out = build("refiners", "dsnot", share=1.0).apply(task, pruned)
    pattern.check(out.keep, 0.5)
    assert not bool((out.weight * ~out.keep).any())
    both = pruned.keep & out.keep
    assert torch.equal(
        out.weight[both], pruned.weight[both]
    )  # what stays keeps its value, also one SparseGPT moved
    assert torch.equal(out.weight[out.keep & ~pruned.keep], task.weight[out.keep & ~pruned.keep])
    errors = [((task.weight - p.weight) @ task.stats.sample.T).square().sum() for p in (pruned, out)]
    assert errors[1] <= errors[0] * 1.0001


def test_dsnot_lets_no_nan_through_on_constant_and_dead_features():
    x = inputs(64)
    x[..., 3], x[..., 4] = 0.0, 2.5
    task = job(Unstructured("row"), 0.5, rows=20, columns=64, x=x)
    keep, wanda = start_of(task)
    for verified in (True, False):
        refined(task, keep, wanda, share=1.0, verified=verified)


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
