"""The reference versions in phases, and those with other trained tensors: gradients, exact counts, cases by
hand, and rows of four numbers.
"""

from __future__ import annotations

import numpy as np
import pytest
import recovery_oracles as ro
import recovery_oracles_phases as phases
from recovery_oracles import SGD, AdamW
from recovery_toy import RATES, STEPS, Recorded, assert_exact, assert_same, mean_square, numeric, problem

OPTIMIZERS = {"sgd": lambda: SGD(0.9), "adamw": lambda: AdamW((0.9, 0.95))}
EVERY_THIRD = [t % 3 == 2 for t in range(STEPS)]


@pytest.fixture(params=OPTIMIZERS)
def make(request):
    return OPTIMIZERS[request.param]


@pytest.fixture
def toy():
    weight, keep, batches = problem()
    return weight, keep, ro.squared_error(batches)


# --- AC/DC


def test_acdc_is_a_sparsity_that_falls_to_zero_and_returns(toy, make):
    weight, keep, gradient = toy
    rates = [4 * rate for rate in RATES]  # so that the masks of two compressed phases differ
    dense = [False] * 3 + [True] * 3 + [False] * 2 + [True] * 2 + [False] * 2
    history = phases.acdc(weight, keep, gradient, rates, make, 0.5, dense)
    ahead = [*dense[1:], dense[-1]]
    moves = [now != then for now, then in zip(dense, ahead, strict=True)]
    sparsity = [0.0 if then else 0.5 for then in ahead]
    row = dict(sparsity=sparsity, moves=moves)
    assert_same(history, ro.four_numbers(weight, keep, gradient, rates, make, **row))
    for step, then in zip(history, ahead, strict=True):
        assert_exact(step.keep, 0.0 if then else 0.5)
    assert not history[2].theta[~keep].any() and history[3].theta[~keep].all()  # back as zeros, then moving
    assert not np.array_equal(history[-1].keep, keep)


def test_acdc_may_begin_dense(toy, make):
    weight, keep, gradient = toy
    first, second = phases.acdc(weight, keep, gradient, RATES[:2], make, 0.5, [True, False])
    assert np.array_equal(first.keep, ro.top(np.abs(first.theta), 0.5)) and second.weight[first.keep].all()
    (alone,) = phases.acdc(weight, keep, gradient, RATES[:1], make, 0.5, [True])
    dense = np.ones(keep.shape, bool)
    assert_same([alone], ro.masked_fine_tuning(weight, dense, gradient, RATES[:1], make))


# --- grow and prune


def layers(batches):
    """Y = X V0^T V1^T: the gradients of the mean square of the error for both matrices."""

    def loss(weights, t):
        x, y = batches[t % len(batches)]
        return float(((x @ weights[0].T @ weights[1].T - y) ** 2).mean())

    def gradient(weights, t):
        x, y = batches[t % len(batches)]
        hidden = x @ weights[0].T
        error = 2 / y.size * (hidden @ weights[1].T - y)
        return [(error @ weights[1]).T @ x, error.T @ hidden]

    return loss, gradient


def test_gap_holds_one_part_dense_and_ends_sparse(make):
    first, keep_first, _ = problem(rows=6)
    second, _, batches = problem(1, rows=4, columns=6)
    keep_second = ro.top(np.abs(second), (1, 2))
    batches = [(np.random.default_rng(t).normal(size=(16, 8)), y) for t, (_, y) in enumerate(batches)]
    loss, gradient = layers(batches)
    weights = [first * keep_first, second * keep_second]
    for j in range(2):
        varied = numeric(lambda x, j=j: loss([x if i == j else weights[i] for i in range(2)], 1), weights[j])
        np.testing.assert_allclose(gradient(weights, 1)[j], varied, atol=1e-6)
    parts = [0, 0, 0, 1, 1, 1, 0, 0, 0, None, None, None]
    history = phases.gap(
        [first, second], [keep_first, keep_second], gradient, RATES, make, [0.5, (1, 2)], [0, 1], parts
    )
    for step, then in zip(history, [*parts[1:], None], strict=True):
        for j, sparsity in enumerate([0.5, (1, 2)]):
            assert_exact(step.keep[j], 0.0 if then == j else sparsity)
            assert not step.weight[j][~step.keep[j]].any()
    assert history[0].theta[0].all()  # the first part was dense from step 0
    assert np.array_equal(history[2].keep[0], ro.top(np.abs(history[2].theta[0]), 0.5))
    assert not history[2].theta[1][~keep_second].any() and history[3].theta[1].all()


def test_gap_with_one_matrix_that_is_never_dense_is_fine_tuning(toy, make):
    weight, keep, gradient = toy
    args = [weight * keep], [keep], lambda weights, t: [gradient(weights[0], t)]
    history = phases.gap(*args, RATES, make, [0.5], [0], [None] * STEPS)
    for step, wanted in zip(history, ro.masked_fine_tuning(weight, keep, gradient, RATES, make), strict=True):
        np.testing.assert_allclose(step.theta[0], wanted.theta)


# --- soft shrinkage


def test_soft_shrinkage_is_its_row(toy, make):
    weight, keep, gradient = toy
    soft = 8
    history = phases.iss_p(weight, keep, gradient, RATES, make, 0.5, 0.95, soft)
    row = {
        "beta": [1.0] * soft + [0.0] * (STEPS - soft),
        "gamma": [1.0] * soft + [0.0] * (STEPS - soft),
        "rho": [0.95] * soft + [0.0] * (STEPS - soft),
        "moves": [t < soft for t in range(STEPS)],
        "sparsity": 0.5,
    }
    assert_same(history, ro.four_numbers(weight, keep, gradient, RATES, make, **row))
    assert history[soft - 1].weight.all() and not history[soft].weight[~history[soft].keep].any()
    for step in history:
        assert_exact(step.keep, 0.5)


def test_soft_shrinkage_by_hand_in_both_orders():
    """Without gradient the smaller weight shrinks by a half a step; the mask so far was the other way
    round.
    """
    theta, keep = np.array([[1.0, 1.5]]), np.array([[True, False]])

    def run(**options):
        return phases.iss_p(theta, keep, lambda weight, t: 0 * weight, [0.1] * 2, SGD, 0.5, 0.5, 2, **options)

    first, second = run()
    assert first.theta.tolist() == [[1.0, 0.75]] and second.theta.tolist() == [[1.0, 0.375]]
    first, second = run(mask_first=True)
    assert first.theta.tolist() == [[0.5, 1.5]] and second.theta.tolist() == [[0.25, 1.5]]
    assert first.keep.tolist() == [[False, True]]


# --- powerpropagation


def test_powerpropagation_moves_along_its_gradient():
    weight, keep, batches = problem()
    loss = mean_square(batches[0])
    (step,) = phases.powerpropagation(weight, keep, ro.squared_error(batches), [0.1], SGD, 3.0)
    theta = np.cbrt(weight) * keep
    np.testing.assert_allclose(phases.power(theta, 3.0), weight * keep)
    wanted = numeric(lambda x: loss(keep * x * np.abs(x) ** 2), theta)
    np.testing.assert_allclose(theta - step.theta, 0.1 * wanted, atol=1e-7)


def test_powerpropagation_moves_v_by_its_own_size_in_sgd():
    """A small step of SGD moves V by a^2 |theta|^(2a - 2) G."""
    weight, keep, batches = problem()
    gradient, rate, a = ro.squared_error(batches), 1e-7, 2.0
    (step,) = phases.powerpropagation(weight, keep, gradient, [rate], SGD, a)
    start = weight * keep
    wanted = a**2 * np.abs(start) ** ((2 * a - 2) / a) * gradient(start, 0)
    np.testing.assert_allclose((start - step.weight) / rate, wanted, atol=1e-5)


def test_powerpropagation_prunes_for_good_and_with_a_1_is_gmp(toy, make):
    weight, keep, gradient = toy
    sparsity = [0.5 + 0.25 * t / STEPS for t in range(STEPS)]
    history = phases.powerpropagation(weight, keep, gradient, RATES, make, 2.0, sparsity, EVERY_THIRD)
    for t, step in enumerate(history):
        assert_exact(step.keep, sparsity[t] if t > 1 and EVERY_THIRD[t] else int((~step.keep)[0].sum()) / 8)
        assert not step.weight[~step.keep].any()
    assert not history[-1].keep[~keep].any()
    history = phases.powerpropagation(weight, keep, gradient, RATES, make, 1.0, sparsity, EVERY_THIRD)
    row = dict(sparsity=sparsity, moves=EVERY_THIRD)
    assert_same(history, ro.four_numbers(weight, keep, gradient, RATES, make, **row))


# --- LoSA


def test_losa_between_moves_is_masked_lora(toy):
    weight, keep, gradient = toy
    draw = np.random.default_rng(3)
    adapters = [draw.normal(size=(rank, weight.shape[1])) for rank in (2, 3, 2)]
    moves = [t in (3, 7) for t in range(STEPS)]
    sparsity = [0.5 if t < 5 else 0.75 for t in range(STEPS)]
    history = phases.losa(
        weight,
        np.ones(keep.shape, bool),
        adapters,
        gradient,
        RATES,
        AdamW,
        4.0,
        sparsity,
        moves,
    )
    masks = [history[2].keep, history[3].keep, history[7].keep]
    assert masks[0].all()
    assert_exact(masks[1], 0.5)
    assert_exact(masks[2], 0.75)
    assert not masks[2][~masks[1]].any()
    start, old = history[3], masks[1]
    assert not start.theta[1].any() and np.array_equal(start.theta[0], adapters[1])
    again = ro.masked_lora(
        start.weight, old, adapters[1], lambda v, t: gradient(v, t + 4), RATES[4:7], AdamW, 4.0
    )
    for step, wanted in zip(history[4:7], again, strict=True):
        np.testing.assert_allclose(step.weight, wanted.weight)
    for step in history:
        assert not step.weight[~step.keep].any()


def test_a_merge_without_pruning_leaves_v(toy):
    weight, keep, gradient = toy
    adapters = [np.random.default_rng(seed).normal(size=(2, weight.shape[1])) for seed in range(2)]
    (step,) = phases.losa(weight, keep, adapters, gradient, [0.1], SGD, 4.0, 0.5, True)
    (wanted,) = ro.masked_lora(weight, keep, adapters[0], gradient, [0.1], SGD, 4.0)
    np.testing.assert_allclose(step.weight, wanted.weight)


@pytest.mark.parametrize(("keep_count", "count"), [(False, 1), (True, 3)])
def test_new_adapters_have_new_moments(toy, keep_count, count):
    recorded = Recorded()
    weight, keep, gradient = toy
    adapters = [np.random.default_rng(seed).normal(size=(2, weight.shape[1])) for seed in range(2)]
    moves = [False, True, False]
    phases.losa(
        weight, keep, adapters, gradient, [0.1] * 3, recorded.make, 4.0, 0.5, moves, keep_count=keep_count
    )
    assert [each.count for each in recorded.made] == [2, 2, count, count]
    again = recorded.made[3]  # of the second B
    np.testing.assert_allclose(again.v, again.m**2 / 0.01 * 0.001)  # one gradient each


# --- ELSA


def test_elsa_projects_and_collects_the_difference(toy):
    weight, keep, gradient = toy
    history = phases.elsa(weight, keep, gradient, RATES, AdamW, 0.5, EVERY_THIRD, 0.5)
    z_before, u_before = weight * keep, np.zeros(weight.shape)
    for step, move in zip(history, EVERY_THIRD, strict=True):
        theta, z, u = step.theta
        assert_exact(step.keep, 0.5)
        assert step.weight is theta
        if move:
            np.testing.assert_allclose(z[step.keep], (theta + u_before)[step.keep])
            np.testing.assert_allclose(u, u_before + theta - z)
            assert not u[step.keep].any() and not z[~step.keep].any()
        else:
            assert np.array_equal(z, z_before) and np.array_equal(u, u_before)
        z_before, u_before = z, u


def test_elsa_with_a_strong_pull_ends_sparse(toy):
    """Without a loss, theta comes to z: pruned weights go to zero, kept ones stay."""
    weight, keep, _ = toy
    moves = [t % 32 == 31 for t in range(640)]
    history = phases.elsa(weight, keep, lambda v, t: 0 * v, [0.02] * 640, AdamW, 0.5, moves, 1.0)
    theta, z, _ = history[-1].theta
    assert np.abs(theta - z).max() < 0.05
    assert (np.abs(theta)[~history[-1].keep] < 0.05).all()


def test_elsa_weighs_by_adams_second_moment():
    """v x^2 is 9 * 1 against 1 * 4; by |x|, or by sqrt(v) x^2, the second weight would stay."""
    theta, keep, g = np.array([[1.0, 2.0]]), np.array([[False, True]]), np.array([[3.0, 1.0]])
    (step,) = phases.elsa(theta, keep, lambda v, t: g, [0.0], AdamW, 0.5, True, 0.0)
    assert step.keep.tolist() == [[True, False]]
    assert step.theta[1].tolist() == [[1.0, 0.0]] and step.theta[2].tolist() == [[0.0, 2.0]]


def test_two_steps_of_elsa_by_hand():
    """At rate 0. First z is 0 2 and g is 4 1, so z becomes 1 0 and u 0 2. Then g is 3 + 1 - 1 + 0 and
    1 + 2 - 0 + 2, x is 1 4 and v nearly even: z becomes 0 4, u becomes 0 2 + 1 2 - 0 4.
    """
    recorded = Recorded()
    theta, keep, g = np.array([[1.0, 2.0]]), np.array([[False, True]]), np.array([[3.0, 1.0]])
    first, second = phases.elsa(theta, keep, lambda v, t: g, [0.0] * 2, recorded.make, 0.5, True, 1.0)
    assert [each.tolist() for each in first.theta] == [[[1.0, 2.0]], [[1.0, 0.0]], [[0.0, 2.0]]]
    assert [each.tolist() for each in second.theta] == [[[1.0, 2.0]], [[0.0, 4.0]], [[1.0, 0.0]]]
    np.testing.assert_allclose(recorded.made[0].m, [[0.09 * 4 + 0.1 * 3, 0.09 * 1 + 0.1 * 5]])


def test_elsa_projects_theta_plus_u():
    """The weights are 1 and 2 and stay; the second is pruned first (v 9 1) and comes back by its u: 1 16."""
    theta, keep, g = np.array([[1.0, 2.0]]), np.array([[False, True]]), np.array([[3.0, 1.0]])
    first, second = phases.elsa(theta, keep, lambda v, t: g, [0.0] * 2, AdamW, 0.5, True, 0.0)
    assert first.keep.tolist() == [[True, False]] and second.keep.tolist() == [[False, True]]
