"""The reference versions with a mask that moves: exact counts after each move, each method against its row of
four numbers, and small cases by hand.
"""

from __future__ import annotations

import itertools

import numpy as np
import oracles
import pytest
import recovery_oracles as ro
import recovery_oracles_evolving as evolving
from recovery_oracles import SGD, AdamW, ASTAdamW
from recovery_toy import COLUMNS, RATES, ROWS, STEPS, Recorded, assert_exact, assert_same, problem

EVERY_THIRD = [t % 3 == 2 for t in range(STEPS)]
RISING = [min(0.75, 0.25 + 0.05 * t) for t in range(STEPS)]
LADDER = [(3, 4)] * 4 + [(2, 4)] * 4 + [(1, 4)] * 4
PULL = [0.01 * min(1.0, t / 6) for t in range(STEPS)]
DRAWS = [np.random.default_rng(100 + t).random((ROWS, COLUMNS)) for t in range(STEPS)]
OPTIMIZERS = {"sgd": lambda: SGD(0.9), "adamw": lambda: AdamW((0.9, 0.95)), "ast": ASTAdamW}
GROWTH = ["random", "unfired", "gradient", "momentum", "ee"]


@pytest.fixture(params=OPTIMIZERS)
def make(request):
    return OPTIMIZERS[request.param]


@pytest.fixture(params=[0, 1])
def toy(request):
    weight, keep, batches = problem(request.param)
    return weight, keep, ro.squared_error(batches)


def first(history, keep):
    """The masks before each step and after it."""
    masks = [keep, *(step.keep for step in history)]
    return list(itertools.pairwise(masks))


def assert_moves(history, keep, moves, sparsity):
    """The mask changes in no other step, is exact after each move, and V is zero where it prunes."""
    for (before, after), step, move, amount in zip(
        first(history, keep), history, moves, sparsity, strict=True
    ):
        assert not step.weight[~after].any()
        if move:
            assert_exact(after, amount)
        else:
            assert np.array_equal(before, after)
    assert any(not np.array_equal(before, after) for before, after in first(history, keep))


# --- each method against its row of four numbers


@pytest.mark.parametrize("forget", [True, False])
def test_sr_ste(toy, make, forget):
    weight, keep, gradient = toy
    history = evolving.sr_ste(weight, keep, gradient, RATES, make, (2, 4), EVERY_THIRD, PULL, forget=forget)
    assert_moves(history, keep, EVERY_THIRD, [(2, 4)] * STEPS)
    row = dict(beta=0.0, gamma=1.0, pull=PULL, rho=1.0, sparsity=(2, 4), moves=EVERY_THIRD, forget=forget)
    assert_same(history, ro.four_numbers(weight, keep, gradient, RATES, make, **row))


def test_ast_is_sr_ste_with_its_own_optimizer(toy):
    weight, keep, gradient = toy
    second_moment = np.linspace(0.1, 2, COLUMNS)

    def score(theta):
        return oracles.wanda_score(theta, second_moment)

    history = evolving.ast(weight, keep, gradient, RATES, 0.5, EVERY_THIRD, PULL, score, decay=0.1)
    assert_moves(history, keep, EVERY_THIRD, [0.5] * STEPS)
    assert np.array_equal(history[2].keep, ro.top(np.abs(history[2].theta) * second_moment**0.5, 0.5))
    row = dict(gamma=1.0, pull=PULL, rho=1.0, sparsity=0.5, moves=EVERY_THIRD, score=score)
    make = lambda: ASTAdamW(decay=0.1)  # noqa: E731
    assert_same(history, ro.four_numbers(weight, keep, gradient, RATES, make, **row))


def test_mdgf(toy, make):
    weight, keep, gradient = toy
    beta = [max(0.0, 1 - 0.1 * t) for t in range(STEPS)]
    history = evolving.mdgf(weight, keep, gradient, RATES, make, (2, 4), True, beta)
    row = dict(beta=beta, gamma=1.0, rho=1.0, sparsity=(2, 4), moves=True)
    assert_same(history, ro.four_numbers(weight, keep, gradient, RATES, make, **row))
    for step, share in zip(history, beta, strict=True):
        assert_exact(step.keep, (2, 4))
        np.testing.assert_allclose(step.weight[~step.keep], share * step.theta[~step.keep])
    assert not history[-1].weight[~history[-1].keep].any()


def test_sdgf(toy, make):
    weight, keep, gradient = toy
    history = evolving.sdgf(weight, keep, gradient, RATES, make, LADDER, EVERY_THIRD)
    assert_moves(history, keep, EVERY_THIRD, LADDER)
    row = dict(gamma=1.0, rho=1.0, sparsity=LADDER, moves=EVERY_THIRD)
    assert_same(history, ro.four_numbers(weight, keep, gradient, RATES, make, **row))


def test_dpf_is_sr_ste_without_decay(toy, make):
    weight, keep, gradient = toy
    history = evolving.dpf(weight, keep, gradient, RATES, make, RISING, EVERY_THIRD)
    assert_moves(history, keep, EVERY_THIRD, RISING)
    assert_same(history, evolving.sr_ste(weight, keep, gradient, RATES, make, RISING, EVERY_THIRD, 0.0))
    row = dict(gamma=1.0, rho=1.0, sparsity=RISING, moves=EVERY_THIRD)
    assert_same(history, ro.four_numbers(weight, keep, gradient, RATES, make, **row))


def test_gmp(toy, make):
    weight, keep, gradient = toy
    sparsity = [0.5 + 0.25 * t / STEPS for t in range(STEPS)]
    history = evolving.gmp(weight, keep, gradient, RATES, make, sparsity, EVERY_THIRD)
    assert_moves(history, keep, EVERY_THIRD, sparsity)
    assert all(not after[~before].any() for before, after in first(history, keep))  # nested
    row = dict(sparsity=sparsity, moves=EVERY_THIRD)
    assert_same(history, ro.four_numbers(weight, keep, gradient, RATES, make, **row))


def test_masked_fine_tuning_is_the_row_of_zeros(toy, make):
    weight, keep, gradient = toy
    history = ro.masked_fine_tuning(weight, keep, gradient, RATES, make)
    assert_same(history, ro.four_numbers(weight, keep, gradient, RATES, make))
    assert all(np.array_equal(step.keep, keep) for step in history)


def test_with_rate_zero_nothing_moves(toy, make):
    weight, keep, gradient = toy
    still = [0.0] * STEPS
    for history in (
        ro.masked_fine_tuning(weight, keep, gradient, still, make),
        evolving.sr_ste(weight, keep, gradient, still, make, 0.5, True, PULL),
        evolving.gmp(weight, keep, gradient, still, make, 0.5, True),
    ):
        assert all(np.array_equal(step.weight, weight * keep) for step in history)


def test_one_step_of_sr_ste_by_hand():
    """V = (2, 0); X = (1, 1), Y = 0: G = 2 * 2 for both; the pruned 1 also decays by 0.1 * 0.5 * 1."""
    x, y = np.array([[1.0, 1.0]]), np.array([[0.0]])
    theta, keep = np.array([[2.0, 1.0]]), np.array([[True, False]])
    gradient = ro.squared_error([(x, y)])
    (step,) = evolving.sr_ste(theta, keep, gradient, [0.1], SGD, 0.5, True, 0.5)
    np.testing.assert_allclose(step.theta, [[1.6, 0.55]])
    assert step.keep.tolist() == [[True, False]]
    (step,) = evolving.sr_ste(theta, keep, gradient, [0.4], SGD, 0.5, True, 0.5)
    np.testing.assert_allclose(step.theta, [[0.4, -0.8]])
    assert step.keep.tolist() == [[False, True]] and step.weight.tolist() == [[0.0, -0.8]]


def test_clipping_counts_only_what_moves():
    """G = (4, 4), the second pruned: norm 4 under gamma 0; sqrt(32) under gamma 1."""
    x, y = np.array([[1.0, 1.0]]), np.array([[0.0]])
    theta, keep = np.array([[2.0, 1.0]]), np.array([[True, False]])
    for gamma, wanted in [(0.0, 2 - 1.0), (1.0, 2 - 2**-0.5)]:
        (step,) = ro.four_numbers(theta, keep, ro.squared_error([(x, y)]), [1.0], SGD, gamma=gamma, clip=1.0)
        np.testing.assert_allclose(step.theta, [[wanted, 0.0]])


# --- drop and grow


@pytest.mark.parametrize("growth", GROWTH)
@pytest.mark.parametrize("drop", ["magnitude", "set"])
@pytest.mark.parametrize("sparsity", [0.5, (2, 4)])
def test_drop_and_grow_is_exact(toy, growth, drop, sparsity):
    weight, _, gradient = toy
    keep = ro.top(np.abs(weight), sparsity)
    history = evolving.drop_and_grow(
        weight,
        keep,
        gradient,
        RATES,
        OPTIMIZERS["adamw"],
        sparsity,
        EVERY_THIRD,
        0.5,
        growth,
        drop,
        DRAWS,
        c=0.1,
    )
    assert_moves(history, keep, EVERY_THIRD, [sparsity] * STEPS)
    for before, after in first(history, keep):
        assert ((before & ~after).sum(axis=1) <= 2).all()  # int(0.5 * 4) of each row
    assert all(np.array_equal(step.theta, step.weight) for step in history)


def test_drop_rules_by_hand():
    theta = np.array([[0.5, -0.1, 0.0, 0.3, -0.4, 0.2, -3.0, 9.0]])
    keep = np.array([[True, True, True, True, True, True, True, False]])
    dropped = keep & ~evolving.drop_lowest(theta, keep, 0.5)  # int(0.5 * 7) = 3
    assert np.flatnonzero(dropped).tolist() == [1, 2, 5]
    dropped = keep & ~evolving.drop_lowest(theta, keep, 0.5, "set")
    assert np.flatnonzero(dropped).tolist() == [1, 2, 5]  # two smallest not negative, the least negative
    dropped = keep & ~evolving.drop_lowest(theta, keep, 0.6, "set")
    assert np.flatnonzero(dropped).tolist() == [1, 2, 4, 5]  # two and two: -0.4 instead of 0.3
    one_sign = np.array([[1.0, 2.0, 3.0, -4.0]])
    dropped = ~evolving.drop_lowest(one_sign, np.ones((1, 4), bool), 1.0, "set")
    assert dropped.all()


def test_rigl_by_hand():
    """The step moves the mask only: the smallest kept weight goes, the largest gradient comes, at 0."""
    gradients = np.array([[1.0, -2.0, 50.0, 3.0]])
    theta, keep = np.array([[4.0, 0.5, 0.0, 0.0]]), np.array([[True, True, False, False]])

    def gradient(weight, t):
        return gradients

    args = (theta, keep, gradient, [0.1], SGD, 0.5, True, 0.5, "gradient")
    (step,) = evolving.drop_and_grow(*args)
    assert step.keep.tolist() == [[True, False, True, False]]
    assert step.theta.tolist() == [[4.0, 0.0, 0.0, 0.0]]
    (step,) = evolving.drop_and_grow(*args, origin=np.full((1, 4), 7.0))
    assert step.theta.tolist() == [[4.0, 0.0, 7.0, 0.0]]
    (step,) = evolving.drop_and_grow(*args, still=False)
    np.testing.assert_allclose(step.theta, [[3.9, 0.0, 0.0, 0.0]])
    gradients = np.array([[1.0, -90.0, 50.0, 3.0]])
    (step,) = evolving.drop_and_grow(*args)  # dropped and grown again: it keeps its value
    assert step.keep.tolist() == [[True, True, False, False]] and step.theta.tolist() == [[4.0, 0.5, 0, 0]]


def test_moments_of_grown_weights_are_zero_and_those_of_regrown_ones_stay():
    recorded = Recorded()
    gradients = [np.array([[1.0, 2.0, 0.0, 0.0]]), np.array([[0.0, 9.0, 1.0, 0.0]])]

    def gradient(weight, t):
        return gradients[t] if t < 2 else np.array([[0.0, 0.1, 5.0, 0.0]])

    theta, keep = np.array([[4.0, 0.5, 0.0, 0.0]]), np.array([[True, True, False, False]])
    moves = [False, True, True]
    for steps in (2, 3):
        evolving.drop_and_grow(
            theta, keep, gradient, [0.1] * steps, recorded.make, 0.5, moves[:steps], 0.5, "gradient"
        )
    np.testing.assert_allclose(recorded.made[0].m, [[0.1, 0.2, 0.0, 0.0]])  # weight 1 dropped and grown again
    np.testing.assert_allclose(recorded.made[1].m, [[0.1, 0.0, 0.0, 0.0]])  # weight 1 out, weight 2 in
    assert recorded.made[1].count == 1


def test_unfired_weights_come_before_those_that_were_active():
    theta, keep = np.array([[4.0, 3.0, 0.0, 0.0]]), np.array([[True, True, False, False]])
    draws = [np.array([[0.0, 0.9, 0.1, last]]) for last in (0.2, 0.8, 0.8)]
    history = evolving.drop_and_grow(
        theta, keep, lambda weight, t: 0 * weight, [0.1] * 3, SGD, 0.5, True, 0.5, "unfired", uniform=draws
    )
    grown = [np.flatnonzero(step.keep)[1] for step in history]
    assert grown == [3, 2, 1]  # 1 was active from the start, 3 since the first move; then all were


def test_exploration_by_hand():
    """Move 1: weight 1 counts 1 (kept before it), 2 and 3 count 0. At t = 2, c ln(2) / (N + 1) is added."""
    g = np.array([[0.0, 1.0, 0.8, 0.0]])
    theta, keep = np.array([[4.0, 3.0, 0.0, 0.0]]), np.array([[True, True, False, False]])
    moves = [False, True]
    for c, grown in [(0.0, 1), (0.5, 1), (0.7, 2)]:  # 1 + c ln 2 / 2 against 0.8 + c ln 2
        history = evolving.drop_and_grow(
            theta, keep, lambda weight, t: g, [0.0] * 2, SGD, 0.5, moves, 0.5, "ee", c=c
        )
        assert np.flatnonzero(history[-1].keep).tolist() == [0, grown]


def test_momentum_growth_sees_gradients_of_pruned_weights():
    """Two pruned weights with equal gradients at last; the one with the steadier gradient has the larger
    ratio.
    """
    recorded = Recorded()
    steps = [np.array([[0.0, 0.0, 1.0, -1.0]]), np.array([[0.0, 0.0, 1.0, 1.0]])]
    theta, keep = np.array([[4.0, 3.0, 0.0, 0.0]]), np.array([[True, True, False, False]])
    history = evolving.drop_and_grow(
        theta,
        keep,
        lambda weight, t: steps[t],
        [0.1] * 2,
        recorded.make,
        0.5,
        [False, True],
        0.5,
        "momentum",
    )
    assert np.flatnonzero(history[-1].keep).tolist() == [0, 2]
    assert history[-1].theta[0, 2] == 0
    np.testing.assert_allclose(recorded.made[0].m, [[0.0, 0.0, 0.0, 0.01]], atol=1e-12)  # grown: forgotten
    assert recorded.made[0].v[0, 2] == 0 and recorded.made[0].v[0, 3] > 0
