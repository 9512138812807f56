"""Rounding of weights to a symmetric grid: a weight becomes a code of a few bits times its group's scale.

R rows, C columns, G groups of neighbouring columns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

# Of a scale that leaves no weight out: with few bits it pays to cut off the largest weights.
_SHRINK = {8: (1.0,), 4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)}


def scales_of(weight: Tensor, bits: int, group: int) -> Tensor:
    """The scales of a weight [R, C], bfloat16 [R, G]: of several that with the least squared error.

    A scale is that of `group` columns. Zeros, such as pruned weights, cost no error with any scale.
    """
    groups = _grouped(weight.float(), group)
    most = groups.abs().amax(dim=-1) / _largest(bits)
    best = torch.full_like(most, torch.inf)
    scales = most.to(torch.bfloat16)
    for share in _SHRINK[bits]:
        scale = (most * share).to(torch.bfloat16)
        step = scale.float()[..., None]
        error = (_codes(groups, step, bits) * step - groups).square().sum(dim=-1)
        scales, best = torch.where(error < best, scale, scales), torch.minimum(error, best)
    return scales.contiguous()


def codes_of(weight: Tensor, scales: Tensor, bits: int, group: int) -> Tensor:
    """The codes of a weight [R, C] with scales [R, G]: int8 [R, C], the nearest of the grid."""
    codes = _codes(_grouped(weight.float(), group), scales.float()[..., None], bits)
    whole: Tensor = codes.flatten(-2)[:, : weight.shape[1]]
    return whole.to(torch.int8).contiguous()


def _grouped(weight: Tensor, group: int) -> Tensor:
    """[R, G, columns of a group]; the last group is filled up with zeros."""
    whole: Tensor = pad(weight, (0, -weight.shape[1] % group))
    groups: Tensor = whole.unflatten(-1, (-1, group))
    return groups


def _codes(groups: Tensor, step: Tensor, bits: int) -> Tensor:
    largest = _largest(bits)
    codes: Tensor = torch.nan_to_num(groups / step).round().clamp(-largest, largest)
    return codes


def _largest(bits: int) -> int:
    """The largest code: as many below zero as above it."""
    return (1 << (bits - 1)) - 1
