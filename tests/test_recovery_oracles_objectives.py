"""The reference versions of losses and schedules: finite differences, torch, and cases by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import recovery_oracles as ro
import recovery_oracles_objectives as objectives
import recovery_oracles_schedules as schedules
import torch
from recovery_toy import numeric, problem

COUNTED = np.array([[True, True, False], [True, False, True]])
SHAPE = (2, 3, 5)


def drawn(seed):
    return np.random.default_rng(seed).normal(size=SHAPE)


# --- objectives


def test_next_token_equals_torch_and_its_gradient():
    logits, labels = drawn(0), np.array([[1, 4, 2], [0, -100, -100]])
    value, gradient = objectives.next_token(logits, labels, COUNTED)
    wanted = torch.where(torch.from_numpy(COUNTED), torch.from_numpy(labels), torch.tensor(-100))
    theirs = torch.nn.functional.cross_entropy(torch.from_numpy(logits).reshape(-1, 5), wanted.reshape(-1))
    np.testing.assert_allclose(value, theirs.item())
    varied = numeric(lambda x: objectives.next_token(x, labels, COUNTED)[0], logits)
    np.testing.assert_allclose(gradient, varied, atol=1e-9)
    assert not gradient[0, 2].any() and not gradient[1, 1:].any()


def test_labels_are_the_tokens_that_follow():
    assert objectives.next_labels(np.array([[5, 6, 7]])).tolist() == [[6, 7, -100]]


def test_next_token_of_equal_logits_is_the_logarithm_of_the_vocabulary():
    value, _ = objectives.next_token(np.zeros((1, 5)), np.array([3]))
    np.testing.assert_allclose(value, math.log(5))


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_kd_equals_torch_and_its_gradient(tau):
    student, teacher = drawn(1), drawn(2)
    value, gradient = objectives.kd(student, teacher, tau, COUNTED)
    q, p = (torch.log_softmax(torch.from_numpy(x[COUNTED]) / tau, -1) for x in (student, teacher))
    theirs = torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True) * tau**2
    np.testing.assert_allclose(value, theirs.item())
    varied = numeric(lambda x: objectives.kd(x, teacher, tau, COUNTED)[0], student)
    np.testing.assert_allclose(gradient, varied, atol=1e-9)
    assert value > 0 and objectives.kd(teacher, teacher, tau)[0] == 0


@pytest.mark.filterwarnings("ignore:reduction")
def test_the_mean_of_torch_divides_by_the_vocabulary_too():
    student, teacher = drawn(1), drawn(2)
    value, _ = objectives.kd(student, teacher)
    q, p = (torch.log_softmax(torch.from_numpy(x), -1) for x in (student, teacher))
    theirs = torch.nn.functional.kl_div(q, p, reduction="mean", log_target=True)
    np.testing.assert_allclose(value, 5 * theirs.item())


def test_tau_squared_keeps_the_size_of_the_gradient():
    """For a high temperature the gradient tends to (student - teacher) / V, centred, whatever tau is."""
    student, teacher = drawn(1), drawn(2)
    _, warm = objectives.kd(student, teacher, 1e3)
    difference = student - teacher
    wanted = (difference - difference.mean(axis=-1, keepdims=True)) / 5 / 6
    np.testing.assert_allclose(warm, wanted, rtol=0.02, atol=1e-4)


def test_squarehead_by_hand_and_its_gradient():
    value, _ = objectives.squarehead([np.array([[2.0, 0.0]])], [np.array([[1.0, 1.0]])])
    np.testing.assert_allclose(value, 1 / (1 + 0.0078125))
    hidden, teacher = [drawn(3), 10 * drawn(4)], [drawn(5), 10 * drawn(6)]
    value, gradients = objectives.squarehead(hidden, teacher, COUNTED)
    for i in range(2):
        varied = numeric(
            lambda x, i=i: objectives.squarehead(
                [x if j == i else hidden[j] for j in range(2)], teacher, COUNTED
            )[0],
            hidden[i],
        )
        np.testing.assert_allclose(gradients[i], varied, atol=1e-8)
        assert not gradients[i][~COUNTED].any()
    terms = [
        ((own - wanted)[COUNTED] ** 2).mean() / ((wanted[COUNTED] ** 2).mean() + 2**-7)
        for own, wanted in zip(hidden, teacher, strict=True)
    ]
    np.testing.assert_allclose(value, sum(terms))


def test_what_does_not_count_changes_nothing():
    student, teacher, labels = drawn(1), drawn(2), np.array([[1, 4, 2], [0, 3, 3]])
    other = np.where(COUNTED[..., None], student, 9.0)
    for loss in (
        lambda x: objectives.next_token(x, labels, COUNTED),
        lambda x: objectives.kd(x, teacher, 2.0, COUNTED),
        lambda x: objectives.block_error(x, teacher, COUNTED),
        lambda x: objectives.squarehead([x], [teacher], COUNTED)[0:1] * 2,
    ):
        assert loss(student)[0] == loss(other)[0]


def test_the_block_error_of_a_linear_block_has_the_gradient_of_the_toy():
    weight, _, batches = problem()
    x, y = batches[0]
    value, gradient = objectives.block_error(x @ weight.T, y)
    np.testing.assert_allclose(gradient.T @ x, ro.squared_error(batches)(weight, 0))
    np.testing.assert_allclose(value, ((x @ weight.T - y) ** 2).mean())
    output, target = drawn(1), drawn(2)
    _, gradient = objectives.block_error(output, target, COUNTED)
    varied = numeric(lambda h: objectives.block_error(h, target, COUNTED)[0], output)
    np.testing.assert_allclose(gradient, varied, atol=1e-9)


# --- schedules


def progress(t, steps):
    return Fraction(t, steps)


def test_the_cubic_rises_fast_and_then_slowly():
    values = [schedules.cubic(progress(t, 8), 0.0, 0.8, Fraction(1, 4), Fraction(3, 4)) for t in range(9)]
    np.testing.assert_allclose(
        values, [0, 0, 0, 0.8 * (1 - 0.75**3), 0.7, 0.8 * (1 - 0.25**3), 0.8, 0.8, 0.8]
    )
    assert values[6] == 0.8
    assert [round(schedules.losa_sparsity(i, 5, 0.5), 6) for i in range(1, 6)] == [
        0.244,
        0.392,
        0.468,
        0.496,
        0.5,
    ]
    assert schedules.losa_sparsity(5, 5, 0.7) == 0.7


def test_the_phases_of_acdc_on_imagenet():
    """100 epochs: dense to 10, compressed 10-15, dense 15-20, ..., 70-75 compressed, dense 75-85,
    compressed.
    """
    bounds = [Fraction(n, 100) for n in (10, 5, 75, 85)]
    dense = [schedules.acdc_dense(progress(t, 100), *bounds) for t in range(100)]
    wanted = [True] * 10
    for _ in range(6):
        wanted += [False] * 5 + [True] * 5
    wanted += [False] * 5 + [True] * 10 + [False] * 15
    assert dense == wanted
    begins_compressed = [Fraction(n, 10) for n in (0, 2, 6, 8)]
    dense = [schedules.acdc_dense(progress(t, 10), *begins_compressed) for t in range(10)]
    assert dense == [False, False, True, True, False, False, True, True, False, False]


def test_parts_take_turns_and_end_sparse():
    parts = [schedules.gap_part(progress(t, 10), 3, 4, Fraction(8, 10)) for t in range(10)]
    assert parts == [0, 0, 1, 1, 2, 2, 0, 0, None, None]


def test_ladders():
    assert schedules.sdgf_ladder(1, 8) == [(7, 8), (4, 8), (2, 8), (1, 8)]
    assert schedules.sdgf_ladder(2, 4) == [(3, 4), (2, 4)]
    assert schedules.sdgf_ladder(1, 2) == [(1, 2)]
    assert schedules.sdgf_wide_ladder(2, 4) == [(16, 32), (8, 16), (4, 8), (2, 4)]
    rungs = schedules.sdgf_ladder(1, 4)
    taken = [schedules.rung(progress(t, 8), rungs, Fraction(6, 8)) for t in range(8)]
    assert taken == [(3, 4)] * 2 + [(2, 4)] * 2 + [(1, 4)] * 4


def test_drop_shares():
    values = [schedules.drop_share(progress(t, 4), 0.3, Fraction(3, 4)) for t in range(5)]
    np.testing.assert_allclose(values, [0.3, 0.225, 0.075, 0, 0], atol=1e-12)
    values = [schedules.drop_share(progress(t, 4), 0.5, Fraction(3, 4), "constant") for t in range(5)]
    assert values == [0.5, 0.5, 0.5, 0, 0]


def test_ramps():
    assert [schedules.beta(n, 0.25) for n in (-1, 0, 1, 4, 9)] == [1.0, 1.0, 0.75, 0.0, 0.0]
    np.testing.assert_allclose(schedules.beta(3, 0.5, "exponential"), math.exp(-1.5))
    np.testing.assert_allclose(
        [schedules.pull(n, 6e-5, 3000) for n in (0, 1500, 3000, 9000)], [0, 3e-5, 6e-5, 6e-5]
    )
    assert [schedules.linear(progress(t, 2), 100, 500) for t in range(3)] == [100, 300, 500]
    values = [schedules.linear(progress(t, 4), 1, 0, Fraction(1, 4), Fraction(3, 4)) for t in range(5)]
    assert values == [1, 1, 0.5, 0, 0]
    np.testing.assert_allclose(
        [schedules.linear(progress(t, 2), 4, 0.05) for t in range(3)], [4, 2.025, 0.05]
    )


def test_the_learning_rate_warms_up_and_falls_to_its_floor():
    cosine = [schedules.rate(progress(t, 10), 1.0, Fraction(2, 10), 0.1) for t in range(11)]
    np.testing.assert_allclose(cosine[:3], [0, 0.5, 1])
    np.testing.assert_allclose([cosine[6], cosine[10]], [0.55, 0.1])
    straight = [schedules.rate(progress(t, 10), 2.0, 0, 0.0, "linear") for t in range(11)]
    np.testing.assert_allclose(straight, np.linspace(2, 0, 11))
