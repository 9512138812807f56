"""Pruners against their oracles, written independently from the papers' formulas."""

import numpy as np
import oracles
import pytest
import torch
from jobs import PATTERNS, array, build, inputs, job, layer, masked

from llmprune.contracts import InputStats, Job, Need
from llmprune.patterns import NM, Unstructured
from llmprune.statistics.sums import relative_error


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


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", ["ria", "sparsegpt-saliency"])
def test_scores_equal_the_oracle(name, pattern):
    work = layer(pattern)
    if name == "ria":
        score = oracles.ria_score(array(work.weight), array(work.stats.second_moment))
    else:
        score = oracles.sparsegpt_saliency_score(array(work.weight), array(work.stats.gram))
    out = build("pruners", name).prune(work)
    assert np.allclose(array(out.score), score, rtol=1e-3)
    assert np.array_equal(out.keep.numpy(), masked(score, work, pattern))
    assert torch.equal(out.weight, work.weight * out.keep)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_alps_equals_the_oracle(pattern):
    work = layer(pattern)
    weight, keep = oracles.alps(
        array(work.weight), array(work.stats.gram), lambda score: masked(score, work, pattern)
    )
    out = build("pruners", "alps", polish=200).prune(work)
    assert np.array_equal(out.keep.numpy(), keep)
    assert np.allclose(array(out.weight), weight, atol=2e-3)
    assert out.notes["iterations"] % 3 == 0


def test_one_input_group_is_factored_once():
    work = layer("row")
    other = Job("other", work.weight.flip(0), work.stats, work.pattern, work.sparsity, work.generator)
    for name in ("alps", "sparsegpt"):
        build("pruners", name).prune(work)
        made = dict(work.stats._derived)
        build("pruners", name).prune(other)
        assert work.stats._derived.keys() == made.keys() and all(
            work.stats._derived[k] is made[k] for k in made
        )
