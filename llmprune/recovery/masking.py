"""Masks in the forward and the backward pass: the only places where gradients do not follow the formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Masked(torch.autograd.Function):
    """V = theta * (k + beta (1 - k)), with the gradient G * (k + gamma (1 - k)).

    With gamma 1 that is the straight-through estimate (Bengio et al., arXiv 1308.3432).
    """

    @staticmethod
    def forward(ctx: Any, theta: Tensor, keep: Tensor, beta: float, gamma: float) -> Tensor:
        """V, of the shape of `theta`."""
        ctx.save_for_backward(keep)
        ctx.gamma = gamma
        return scaled(theta, keep, beta)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient of theta."""
        (keep,) = ctx.saved_tensors
        return scaled(gradients[0], keep, ctx.gamma), None, None, None


class Chosen(torch.autograd.Function):
    """V = W * k, where k are the highest of a score, with the gradient of the score G * W as if V = W *
    score.

    As in Lottery Jackpots (arXiv 2104.08700) and PST (arXiv 2205.11005).
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, score: Tensor, keep: Tensor) -> Tensor:
        """V, of the shape of `weight`."""
        ctx.save_for_backward(weight, keep)
        return torch.where(keep, weight, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, None]:
        """The gradients of weight and score."""
        weight, keep = ctx.saved_tensors
        of_weight = torch.where(keep, gradients[0], 0.0) if ctx.needs_input_grad[0] else None
        return of_weight, gradients[0] * weight, None


def scaled(values: Tensor, keep: Tensor, share: float) -> Tensor:
    """The values, those of pruned weights times a share; a new tensor unless the share is 1."""
    if share == 1:
        return values
    return torch.where(keep, values, values * share if share else 0.0)
