"""The reference versions with a learned mask: gradients against finite differences, counts, cases by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import recovery_oracles as ro
import recovery_oracles_learned as learned
from recovery_oracles import SGD, AdamW
from recovery_toy import COLUMNS, RATES, ROWS, STEPS, assert_exact, mean_square, numeric, problem


@pytest.fixture
def toy():
    weight, keep, batches = problem()
    return weight, keep, ro.squared_error(batches), mean_square(batches[0])


# --- Lottery Jackpots


def test_jackpots_moves_scores_along_the_straight_through_gradient(toy):
    """As if V = W * (k + S - S0)."""
    weight, keep, gradient, loss = toy
    (step,) = learned.jackpots(weight, keep, gradient, [0.1], SGD, 0.5)
    start = np.where(keep, 1.0, 0.99)
    wanted = numeric(lambda score: loss(weight * (keep + score - start)), start)
    np.testing.assert_allclose(start - step.theta, 0.1 * wanted, atol=1e-7)


@pytest.mark.parametrize("sparsity", [0.5, (2, 4)])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.01])
def test_jackpots_is_exact_at_every_step_and_keeps_weights(toy, sparsity, share):
    weight, _, gradient, _ = toy
    keep = ro.top(np.abs(weight), sparsity)
    history = learned.jackpots(weight, keep, gradient, RATES, lambda: SGD(0.9), sparsity, share)
    before, flips = keep, []
    for step in history:
        assert_exact(step.keep, sparsity)
        assert np.array_equal(step.weight, weight * step.keep)
        if share == 1:
            assert np.array_equal(step.keep, ro.top(step.theta, sparsity))
        flips.append((before & ~step.keep).sum(axis=1).max())
        before = step.keep
    assert max(flips) > 0
    if share == 0.01 and sparsity == 0.5:
        assert max(flips) == 1  # one pair per row


def test_the_short_restriction_by_hand():
    """Three pairs would flip; half of them is one: the highest score comes in, the lowest goes out."""
    score = np.array([[0.1, 0.3, 0.2, 0.9, 0.7, 0.8]])
    keep = np.array([[True, True, True, False, False, False]])
    assert learned.restricted(score, keep, 0.5, 0.5).tolist() == [[False, True, True, True, False, False]]
    assert learned.restricted(score, keep, 0.5, 0.7).tolist() == [[False, True, False, True, False, True]]
    assert np.array_equal(learned.restricted(score, keep, 0.5, 1.0), ro.top(score, 0.5))
    assert np.array_equal(learned.restricted(score, ~keep, 0.5, 0.1), ~keep)


# --- MaskLLM


def test_patterns_stand_in_lexicographic_order():
    assert [np.flatnonzero(each).tolist() for each in learned.patterns(2, 4)] == [
        [0, 1],
        [0, 2],
        [0, 3],
        [1, 2],
        [1, 3],
        [2, 3],
    ]
    assert learned.patterns(1, 4).tolist() == np.eye(4, dtype=bool).tolist()
    assert len(learned.patterns(4, 8)) == math.comb(8, 4)


def test_first_logits_favour_the_prior_mask():
    keep = np.array([[True, False, True, False]])
    logits = learned.maskllm_logits(keep, np.zeros((1, 1, 6)), 2, 4)
    np.testing.assert_allclose(logits, [[[0.0, 0.03, 0.0, 0.0, -0.03, 0.0]]])
    assert np.array_equal(learned.maskllm_hard(logits, 2, 4), keep)
    draws = np.random.default_rng(0).normal(size=(1, 1, 6))
    np.testing.assert_allclose(learned.maskllm_logits(keep, draws, 2, 4) - logits, 0.01 * draws)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4)])
def test_maskllm_moves_along_its_gradient_with_noise_and_penalty(toy, n, m):
    weight, _, gradient, loss = toy
    shape = (ROWS, COLUMNS // m, math.comb(m, n))
    draw = np.random.default_rng(5)
    logits, noise = draw.normal(size=shape), draw.gumbel(size=shape)

    def value(logits):
        soft = learned.maskllm_soft(weight, learned.maskllm_choice(logits, noise, 3.0, 2.0), n, m)
        return loss(soft) - 0.01 * float((soft**2).sum())

    (step,) = learned.maskllm(weight, logits, gradient, [0.1], SGD, n, m, 3.0, 2.0, [noise], 0.01)
    np.testing.assert_allclose(logits - step.theta, 0.1 * numeric(value, logits), atol=1e-7)
    assert_exact(step.keep, (n, m))


def test_a_soft_mask_sums_to_n_and_becomes_hard(toy):
    weight, keep, gradient, _ = toy
    keep = ro.top(np.abs(weight), (2, 4))
    shape = (ROWS, COLUMNS // 4, 6)
    draw = np.random.default_rng(6)
    logits = learned.maskllm_logits(keep, draw.normal(size=shape), 2, 4)
    soft = learned.maskllm_soft(np.ones((ROWS, COLUMNS)), learned.maskllm_choice(logits, 0, 1.0, 1.0), 2, 4)
    np.testing.assert_allclose(soft.reshape(ROWS, -1, 4).sum(axis=2), 2)
    kappa = list(np.linspace(100, 500, STEPS))
    tau = list(np.linspace(4, 0.05, STEPS))
    noise = [draw.gumbel(size=shape) * (t < STEPS - 1) for t in range(STEPS)]
    make = lambda: AdamW((0.9, 0.95), 1e-5, 0.1)  # noqa: E731
    history = learned.maskllm(weight, logits, gradient, [5e-3] * STEPS, make, 2, 4, kappa, tau, noise)
    np.testing.assert_allclose(history[-1].weight, weight * history[-1].keep, atol=1e-3)
    for step in history:
        assert_exact(step.keep, (2, 4))


# --- PST


def factors(seed=7, rank=2):
    draw = np.random.default_rng(seed)
    shapes = [(ROWS, rank), (rank, COLUMNS), (ROWS, rank), (rank, COLUMNS), (ROWS,), (COLUMNS,)]
    return tuple(0.3 * draw.normal(size=shape) for shape in shapes)


@pytest.mark.parametrize("through_score", [True, False])
def test_pst_moves_along_its_straight_through_gradient(toy, through_score):
    """As if V = theta * (k + Z - Z0), with abs(theta) in Z held still where the score is detached."""
    weight, _, gradient, loss = toy
    start = factors()
    theta0 = weight + start[0] @ start[1]
    z0 = learned.pst_score(theta0, start)
    keep = ro.top(z0, 0.5)

    def value(tensors):
        theta = weight + tensors[0] @ tensors[1]
        z = learned.pst_score(theta if through_score else theta0, tensors)
        return loss(theta * (keep + z - z0))

    (step,) = learned.pst(weight, start, keep, gradient, [0.01], SGD, 0.5, through_score=through_score)
    for i in range(6):
        slope = numeric(lambda x, i=i: value([x if j == i else start[j] for j in range(6)]), start[i])
        np.testing.assert_allclose(start[i] - step.theta[i], 0.01 * slope, atol=1e-7)


def test_pst_begins_at_the_pretrained_weight_and_is_exact(toy):
    weight, keep, gradient, _ = toy
    start = list(factors())
    for i in (1, 3, 4, 5):
        start[i] = np.zeros(start[i].shape)
    sparsity = [min(0.5, 0.05 * t) for t in range(STEPS)]
    learning = [t < 8 for t in range(STEPS)]
    history = learned.pst(
        weight, start, np.ones(keep.shape, bool), gradient, RATES, AdamW, sparsity, learning, learning
    )
    for t, step in enumerate(history):
        assert_exact(step.keep, sparsity[min(t, 7)])
        assert not step.weight[~step.keep].any()
        assert np.array_equal(step.keep, history[min(t, 7)].keep)  # frozen after step 7
    for now, then in zip(history[7].theta[2:], history[-1].theta[2:], strict=True):
        assert np.array_equal(now, then)
    assert not np.array_equal(history[7].theta[0], history[-1].theta[0])


def test_pst_without_learning_is_training_at_low_rank(toy):
    weight, keep, gradient, loss = toy
    start = factors()
    (step,) = learned.pst(weight, start, keep, gradient, [0.01], SGD, 0.5, False, False)
    slope = numeric(lambda u: loss(keep * (weight + u @ start[1])), start[0])
    np.testing.assert_allclose(start[0] - step.theta[0], 0.01 * slope, atol=1e-7)
    assert np.array_equal(step.keep, keep)
