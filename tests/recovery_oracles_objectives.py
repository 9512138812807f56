"""Slow, independent reference versions of the losses of training with sparsity: value and gradient.

Everything is numpy float64. Logits are [..., V], hidden states [..., D], labels and `counted` have the
shape of the leading dimensions. All means run over the tokens that count: `counted` is bool, None for all
of them; a token that does not count has no part in the value, and its gradient is 0. At least one token
counts.
"""

from __future__ import annotations

import numpy as np

UNCOUNTED = -100  # the label that transformers ignores
BF16_EPS = 2.0**-7


def _counted(counted: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    counts = np.ones(shape, dtype=bool) if counted is None else counted
    assert counts.any(), "no token counts"
    return counts


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last dimension."""
    raised = logits - logits.max(axis=-1, keepdims=True)
    return raised - np.log(np.exp(raised).sum(axis=-1, keepdims=True))


def next_labels(tokens: np.ndarray) -> np.ndarray:
    """Labels [N, T] of tokens [N, T]: the token that follows; the last one of a row has none (-100)."""
    labels = np.full(tokens.shape, UNCOUNTED)
    labels[:, :-1] = tokens[:, 1:]
    return labels


def next_token(
    logits: np.ndarray, labels: np.ndarray, counted: np.ndarray | None = None
) -> tuple[float, np.ndarray]:
    """Mean cross entropy in nats, with d/dlogits = (softmax - onehot) / n; labels of -100 never count."""
    counts = _counted(counted, labels.shape) & (labels != UNCOUNTED)
    logs, total, n = log_softmax(logits), 0.0, _counted(counts, labels.shape).sum()
    gradient = np.zeros(logits.shape)
    for token in np.argwhere(counts):
        place = tuple(token)
        total -= logs[place][labels[place]] / n
        gradient[place] = np.exp(logs[place]) / n
        gradient[place][labels[place]] -= 1 / n
    return float(total), gradient


def kd(
    student: np.ndarray, teacher: np.ndarray, tau: float = 1.0, counted: np.ndarray | None = None
) -> tuple[float, np.ndarray]:
    """tau^2 / n * sum over tokens of KL(p || q), p and q the softmax of teacher / tau and student / tau; not
    divided by the vocabulary. d/dstudent = tau / n * (q - p).
    """
    counts = _counted(counted, student.shape[:-1])
    n, log_p, log_q = counts.sum(), log_softmax(teacher / tau), log_softmax(student / tau)
    p, q = np.exp(log_p), np.exp(log_q)
    value = tau**2 / n * (p * (log_p - log_q))[counts].sum()
    return float(value), np.where(counts[..., None], tau / n * (q - p), 0.0)


def block_error(
    output: np.ndarray, target: np.ndarray, counted: np.ndarray | None = None
) -> tuple[float, np.ndarray]:
    """Mean of (output - target)^2 over the tokens that count and the width, and d/doutput."""
    counts = _counted(counted, output.shape[:-1])
    size, error = counts.sum() * output.shape[-1], np.where(counts[..., None], output - target, 0.0)
    return float((error**2).sum() / size), 2 / size * error


def squarehead(
    hidden: list[np.ndarray],
    teacher: list[np.ndarray],
    counted: np.ndarray | None = None,
    eps: float = BF16_EPS,
) -> tuple[float, list[np.ndarray]]:
    """SquareHead (arXiv 2310.06927): sum over blocks of mean (H - H~)^2 / (mean H~^2 + eps), both means
    over the tokens that count and the width; and d/dH of each block.
    """
    total, gradients = 0.0, []
    for own, wanted in zip(hidden, teacher, strict=True):
        size, _ = block_error(wanted, np.zeros(wanted.shape), counted)
        error, gradient = block_error(own, wanted, counted)
        total += error / (size + eps)
        gradients.append(gradient / (size + eps))
    return total, gradients
