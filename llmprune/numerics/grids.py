"""Rounding of weights to a symmetric grid: a weight becomes a code of a few bits times its group's scale.

R rows, C columns, G groups of neighbouring columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

GROUP = 128  # columns that share a scale
# Of a scale that leaves no weight out: with few bits it pays to cut off the largest weights.
_LEAST_SHARE = {8: 1.0, 4: 0.7, 3: 0.5, 2: 0.4}
_SHARES = 0.05  # from one share tried to the next
BITS = tuple(_LEAST_SHARE)


def scales_of(weight: Tensor, bits: int, group: int, importance: Tensor | None = None) -> Tensor:
    """The scales of a weight [R, C], bfloat16 [R, G]: of several that with the least squared error.

    A scale is that of `group` columns. Zeros, such as pruned weights, cost no error with any scale.

    Args:
        importance: what the squared error of each column counts, [C]; None for all the same.
    """
    groups = _grouped(weight.float(), group)
    counts = 1.0 if importance is None else _grouped(importance.float()[None], group)
    most = groups.abs().amax(dim=-1) / largest(bits)
    best = torch.full_like(most, torch.inf)
    scales = most.to(torch.bfloat16)
    for number in range(round((1 - _LEAST_SHARE[bits]) / _SHARES) + 1):
        scale = (most * (1 - number * _SHARES)).to(torch.bfloat16)
        step = scale.float()[..., None]
        error = (_codes(groups, step, bits) * step - groups).square().mul_(counts).sum(dim=-1)
        scales, best = torch.where(error < best, scale, scales), torch.minimum(error, best)
    return scales.contiguous()


def codes_of(weight: Tensor, scales: Tensor, bits: int, group: int) -> Tensor:
    """The codes of a weight [R, C] with scales [R, G]: int8 [R, C], the nearest of the grid."""
    codes = _codes(_grouped(weight.float(), group), scales.float()[..., None], bits)
    whole: Tensor = codes.flatten(-2)[:, : weight.shape[1]]
    return whole.to(torch.int8).contiguous()


def rounded(weight: Tensor, steps: Tensor, bits: int) -> Tensor:
    """The nearest value of the grid, for every weight; `steps` are its scale, of a shape that fits."""
    return _codes(weight, steps, bits).mul_(steps)


def spread(scales: Tensor, shape: torch.Size) -> Tensor:
    """The scale of every weight of a parameter, float32 of its shape.

    The parameter may hold its matrices as [R, C] or [C, R], one or several: the dimension in which the scales
    are fewer is that of the columns.
    """
    fewer = [d for d in range(len(shape)) if scales.shape[d] != shape[d]] or [len(shape) - 1]
    whole: Tensor = scales.float().repeat_interleave(GROUP, fewer[0])
    return whole.narrow(fewer[0], 0, shape[fewer[0]])


class Straight(torch.autograd.Function):
    """Rounds to a grid, and lets the gradient pass as if it had not (Bengio et al., arXiv 1308.3432).

    The gradient of a scale is that of LSQ (Esser et al., arXiv 1902.08153).
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, steps: Tensor, bits: int) -> Tensor:
        """The rounded weight, of the shape of `weight`; `steps` has that shape too."""
        codes = _codes(weight, steps, bits)
        ctx.save_for_backward(weight, steps, codes)
        ctx.most = largest(bits)
        return codes * steps

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """The gradients of the weight and of the scale of every weight."""
        weight, steps, codes = ctx.saved_tensors
        (gradient,) = gradients
        exact = torch.nan_to_num(weight / steps)
        inside = exact.abs() <= ctx.most
        of_steps = gradient * torch.where(inside, codes - exact, codes)
        return gradient * inside, of_steps, None


def _grouped(weight: Tensor, group: int) -> Tensor:
    """[R, G, columns of a group]; the last group is filled up with zeros."""
    whole: Tensor = pad(weight, (0, -weight.shape[1] % group))
    groups: Tensor = whole.unflatten(-1, (-1, group))
    return groups


def _codes(groups: Tensor, step: Tensor, bits: int) -> Tensor:
    most = largest(bits)
    codes: Tensor = torch.nan_to_num(groups / step).round().clamp(-most, most)
    return codes


def largest(bits: int) -> int:
    """The largest code: as many below zero as above it."""
    return (1 << (bits - 1)) - 1
