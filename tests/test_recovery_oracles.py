"""The reference versions of training with sparsity: gradients against finite differences, optimizers against
torch, cases computed by hand, facts of the survey; what all methods share, and the methods with a fixed mask.
"""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import recovery_oracles as ro
import torch
from recovery_oracles import SGD, AdamW, ASTAdamW
from recovery_toy import COLUMNS, ROWS, STEPS, mean_square, numeric, problem


def plain():
    return SGD()


# --- masks and optimizers


def test_top_prunes_the_lower_column_of_equal_scores():
    score = np.array([[1.0, 0.0, 0.0, 0.0], [np.inf, 2.0, 2.0, 1.0]])
    assert ro.top(score, 0.5).tolist() == [[True, False, False, True], [True, False, True, False]]
    assert ro.top(score, (1, 2)).tolist() == [[True, False, False, True], [True, False, True, False]]
    assert ro.top(score, 0.74).sum() == 4  # int(4 * 0.74) = 2 pruned per row


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_equals_torch(momentum):
    weight, _, batches = problem()
    gradient, mine, theta = ro.squared_error(batches), SGD(momentum, 0.01), weight
    there = torch.nn.Parameter(torch.from_numpy(weight.copy()))
    theirs = torch.optim.SGD([there], lr=0.05, momentum=momentum, weight_decay=0.01)
    for t in range(6):
        there.grad = torch.from_numpy(gradient(there.detach().numpy(), t))
        theirs.step()
        theta = mine.step(theta, gradient(theta, t), 0.05)
    np.testing.assert_allclose(theta, there.detach().numpy(), rtol=1e-12)


def test_adamw_equals_torch():
    weight, _, batches = problem()
    gradient, mine, theta = ro.squared_error(batches), AdamW((0.8, 0.95), 1e-6, 0.1), weight
    there = torch.nn.Parameter(torch.from_numpy(weight.copy()))
    theirs = torch.optim.AdamW([there], lr=0.05, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    for t in range(6):
        there.grad = torch.from_numpy(gradient(there.detach().numpy(), t))
        theirs.step()
        theta = mine.step(theta, gradient(theta, t), 0.05)
    np.testing.assert_allclose(theta, there.detach().numpy(), rtol=1e-10)


def test_two_steps_of_asts_optimizer_by_hand():
    optimizer, theta = ASTAdamW((0.5, 0.75), 0.0, 0.1), np.array([[2.0]])
    theta = optimizer.step(theta, np.array([[4.0]]), 0.1, np.array([[1.0]]))
    # m 2, u 3, v 0.25 * 9, corrected 9; 2 (1 - 0.01) - 0.1 / 0.5 * 3 / 3
    np.testing.assert_allclose(theta, 1.78)
    theta = optimizer.step(theta, np.array([[0.0]]), 0.1, np.array([[0.5]]))
    # m 1, u 1.5, v 0.75 * 2.25 + 0.25 * 2.25 = 2.25, corrected 2.25 / 0.4375
    np.testing.assert_allclose(theta, 1.78 * 0.99 - 0.1 / 0.75 * np.sqrt(0.4375))


def test_clipping_is_by_the_common_norm():
    parts = [np.array([[3.0, 0.0]]), np.array([[4.0]])]
    scaled = ro.clipped(parts, 1.0)
    np.testing.assert_allclose(np.concatenate(scaled, axis=1), [[0.6, 0.0, 0.8]])
    assert ro.clipped(parts, 6.0)[0].tolist() == [[3.0, 0.0]]


# --- facts of the survey, sections 1 and 8


def test_decay_of_a_pruned_weight_becomes_a_full_step_in_adam():
    """Rate 1e-4, lambda 2e-4, theta 0.02, no loss gradient: 1.0e-4 a step, where SGD moves it by 4e-10."""
    theta, zero = np.array([[0.02]]), np.zeros((1, 1))
    np.testing.assert_allclose(theta - SGD().step(theta, zero, 1e-4, 2e-4 * theta), 4e-10, rtol=1e-6)
    np.testing.assert_allclose(theta - AdamW().step(theta, zero, 1e-4, 2e-4 * theta), 1e-4, rtol=0.01)


def test_asts_form_does_not_spare_a_pruned_weight_without_loss_gradient():
    """Its second moment is that of u, so the decay is normalised too, and the first step is 1 / (1 - beta1)
    times the rate: only a loss gradient that is large against lambda * theta makes the decay small.
    """
    theta, zero = np.array([[0.02]]), np.zeros((1, 1))
    np.testing.assert_allclose(theta - ASTAdamW().step(theta, zero, 1e-4, 2e-4 * theta), 1e-3, rtol=0.01)
    draw, alone, driven = np.random.default_rng(0), ASTAdamW(), ASTAdamW()
    free = pulled = theta
    for _ in range(200):
        g = draw.normal(size=(1, 1))
        free, pulled = alone.step(free, g, 1e-5), driven.step(pulled, g, 1e-5, 2e-4 * pulled)
    assert 0 < (free - pulled).item() < 1e-6  # of 200 steps of 1e-5


def test_moments_move_a_pruned_weight_unless_they_are_zeroed():
    """A steady gradient, then none: theta walks on by 9 rates (0.9 / (1 - 0.9)); forgotten, it stays."""
    one, rate = np.ones((1, 1)), 1e-3
    for forget, walked in [(False, 9 * rate), (True, 0.0)]:
        optimizer, theta = AdamW(), one
        for _ in range(1000):
            theta = optimizer.step(theta, one, rate)
        if forget:
            optimizer.forget(np.ones((1, 1), bool))
        before = theta
        for _ in range(200):
            theta = optimizer.step(theta, 0 * one, rate)
        np.testing.assert_allclose(before - theta, walked, rtol=0.02)


def test_zeroed_moments_with_the_counter_kept_begin_with_a_large_step():
    """(1 - 0.9) / sqrt(1 - 0.999) = 3.16 rates, as bias correction is over; with beta2 0.95 it is 0.45."""
    one = np.ones((1, 1))
    for beta2, size in [(0.999, 0.1 / np.sqrt(0.001)), (0.95, 0.1 / np.sqrt(0.05))]:
        optimizer = AdamW((0.9, beta2))
        optimizer.step(one, one, 1e-3)
        optimizer.count = 10**6
        optimizer.forget(np.ones((1, 1), bool))
        np.testing.assert_allclose(1 - optimizer.step(one, one, 1e-3), size * 1e-3, rtol=1e-6)


def test_a_bfloat16_weight_does_not_move_for_small_steps():
    start = oracles.bfloat16(0.02)
    assert oracles.bfloat16(start - 5e-5) == start
    assert oracles.bfloat16(start - 1e-4) != start


def test_scale_lora_stays_of_rank_one():
    weight, _, batches = problem(rows=6, columns=9)
    a, b = np.full((3, 9), 3**-0.5), np.full((6, 3), 3**-0.5)
    history = ro.scale_lora(weight, a, b, ro.squared_error(batches), [1e-2] * 200, AdamW)
    np.testing.assert_allclose(b @ a, 1)
    last_a, last_b = history[-1].theta
    values = np.linalg.svd(last_b @ last_a, compute_uv=False)
    assert np.abs(last_a - a).max() > 0.1 and values[1] < 1e-12 * values[0]


# --- gradients, by one step of plain SGD


def test_gradient_of_the_squared_error():
    weight, _, batches = problem()
    np.testing.assert_allclose(
        ro.squared_error(batches)(weight, 1), numeric(mean_square(batches[1]), weight), atol=1e-7
    )


def test_masked_lora_moves_along_its_gradient():
    weight, keep, batches = problem()
    a, scale = np.random.default_rng(1).normal(size=(2, COLUMNS)), 3 / 2
    loss = mean_square(batches[1])
    first, second = ro.masked_lora(weight, keep, a, ro.squared_error(batches), [0.1] * 2, plain, alpha=3)
    a, b = first.theta
    assert np.abs(b).max() > 0  # A did not move yet: its gradient was 0 while B was

    def value(a, b):
        return loss(weight * keep + scale * keep * (b @ a))

    np.testing.assert_allclose(a - second.theta[0], 0.1 * numeric(lambda x: value(x, b), a), atol=1e-7)
    np.testing.assert_allclose(b - second.theta[1], 0.1 * numeric(lambda x: value(a, x), b), atol=1e-7)
    assert not second.weight[~keep].any() and second.keep is keep


def test_spp_moves_along_its_gradient():
    weight, keep, batches = problem()
    weight = weight * keep
    a, b = np.zeros((ROWS, 1)), np.random.default_rng(1).normal(size=(2, COLUMNS))
    loss = mean_square(batches[1])
    first, second = ro.spp(weight, a, b, ro.squared_error(batches), [0.1] * 2, plain, c=2.0)
    a, b = first.theta

    def value(a, b):
        return loss(weight * (1 + 2 * a * np.repeat(b, ROWS // 2, axis=0)))

    np.testing.assert_allclose(a - second.theta[0], 0.1 * numeric(lambda x: value(x, b), a), atol=1e-7)
    np.testing.assert_allclose(b - second.theta[1], 0.1 * numeric(lambda x: value(a, x), b), atol=1e-7)
    assert not second.weight[~keep].any()


@pytest.mark.parametrize("shape", [(ROWS,), ()])
def test_norms_move_along_their_gradient(shape):
    weight, _, batches = problem()
    gain, bias, (x, y) = np.full(shape, 1.1), np.full(shape, 0.2), batches[0]
    (step,) = ro.norms(gain, bias, weight, batches, [0.1], plain)

    def value(gain, bias):
        return float(((gain * (x @ weight.T) + bias - y) ** 2).mean())

    np.testing.assert_allclose(gain - step.theta[0], 0.1 * numeric(lambda g: value(g, bias), gain), atol=1e-7)
    np.testing.assert_allclose(bias - step.theta[1], 0.1 * numeric(lambda b: value(gain, b), bias), atol=1e-7)
    assert ro.norms(gain, None, weight, batches, [0.1], plain)[0].theta[1] is None


# --- a fixed mask


def test_masked_fine_tuning_by_hand():
    x, y = np.array([[1.0, 2.0]]), np.array([[3.0]])
    (step,) = ro.masked_fine_tuning(
        np.array([[1.0, 5.0]]), np.array([[True, False]]), ro.squared_error([(x, y)]), [0.25], plain
    )
    assert step.weight.tolist() == [[2.0, 0.0]]  # error 1 - 3, gradient 2 * -2 * 1


def test_a_fixed_mask_never_moves_and_the_loss_falls():
    weight, keep, batches = problem()
    history = ro.masked_fine_tuning(weight, keep, ro.squared_error(batches[:1]), [0.05] * STEPS, AdamW)
    losses = [mean_square(batches[0])(step.weight) for step in history]
    assert losses[-1] < losses[0] < mean_square(batches[0])(weight * keep)
    for step in history:
        assert np.array_equal(step.keep, keep) and not step.theta[~keep].any()


def test_soups_prune_a_share_of_what_is_left_and_average():
    weight, _, batches = problem(columns=16)
    np.testing.assert_allclose(ro.soup_sparsities(0.75, 2), [0.5, 0.75])
    assert ro.soup_sparsities(0.7, 3)[-1] == 0.7
    runs = [(ro.squared_error(batches[i:]), [0.02] * 5, AdamW) for i in range(2)]
    dense = np.ones(weight.shape, bool)
    phases = [(sparsity, runs) for sparsity in ro.soup_sparsities(0.75, 2)]
    first, second = ro.soups(weight, dense, phases)
    assert np.array_equal(first.keep, ro.top(np.abs(weight), 0.5))
    assert np.array_equal(second.keep, ro.top(np.abs(first.weight), 0.75))
    assert not second.keep[~first.keep].any() and not second.weight[~second.keep].any()
    ends = [ro.masked_fine_tuning(weight, first.keep, *run)[-1].theta for run in runs]
    np.testing.assert_allclose(first.weight, (ends[0] + ends[1]) / 2)


def test_a_greedy_soup_leaves_out_what_harms():
    def loss(weight):
        return float(((weight - 1) ** 2).sum())

    good, other, bad = np.full((1, 2), 0.9), np.full((1, 2), 1.2), np.full((1, 2), 9.0)
    np.testing.assert_allclose(ro.greedy_soup([bad, other, good], loss), (good + other) / 2)
