"""Refiners against their oracles, written independently from the papers' formulas."""

import numpy as np
import oracles
import pytest
import torch
from jobs import PATTERNS, array, build, inputs, job, layer

from llmprune.contracts import Job, Pruned
from llmprune.patterns import NM, Unstructured


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


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_swaps_equal_the_oracle_and_lower_every_row(pattern, pruner):
    work = layer(pattern)
    start = build("pruners", pruner).prune(work)
    out = build("refiners", "swaps").apply(work, start)
    w, gram = array(work.weight), array(work.stats.gram)
    width = work.pattern.width
    wanted = oracles.swaps(w, array(start.weight), start.keep.numpy(), gram, width)
    # Where two swaps are equally good rounding decides, and the rows go separate ways from there.
    assert (out.keep.numpy() == wanted).all(axis=1).mean() >= 0.75
    before, after = (
        oracles.row_loss(w, array(start.weight), gram),
        oracles.row_loss(w, array(out.weight), gram),
    )
    assert bool((after <= before * (1 + 1e-6)).all()) and after.sum() < before.sum()
    moved = np.where(wanted, np.where(start.keep.numpy() & wanted, array(start.weight), w), 0.0)
    assert after.sum() == pytest.approx(oracles.row_loss(w, moved, gram).sum(), rel=0.02)
    assert np.array_equal(out.keep.sum(1), start.keep.sum(1))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_swaps_that_look_up_seldom_end_the_same(pattern, monkeypatch):
    """On a GPU rows that have no swap left stay among the others for a while; one row has nothing pruned, one
    nothing kept.
    """
    from llmprune.refiners import swaps

    work = layer(pattern)
    start = build("pruners", "wanda").prune(work)
    if pattern == "matrix":
        keep = start.keep.clone()
        keep[0], keep[1] = True, False
        start = Pruned(work.weight * keep, keep, start.score)
    often = build("refiners", "swaps").apply(work, start)
    monkeypatch.setitem(swaps._LOOK, "cpu", 16)
    seldom = build("refiners", "swaps").apply(work, start)
    assert torch.equal(often.keep, seldom.keep) and torch.equal(often.weight, seldom.weight)
