"""The kept values of a matrix alone, for training in which no mask moves: pruned weights take no memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmprune.kernels import packing
from llmprune.recovery.keeps import Keeps


class Places:
    """Where the kept values of a matrix lie.

    Args:
        keep: its keep mask, bool [R, C].
    """

    def __init__(self, keep: Tensor) -> None:
        self._shape = (keep.shape[0], keep.shape[1])
        # Native code packs on a CPU alone; elsewhere the bits stay on the device of the matrix.
        self._bits = packing.bits_of(keep) if _packs(keep) else None
        self._keeps = Keeps({} if _packs(keep) else {"": keep})

    def values(self, matrix: Tensor) -> Tensor:
        """The kept values of a matrix, float32 [kept]."""
        if self._bits is not None:
            return packing.compress(matrix, self._bits)
        return matrix.masked_select(self._keeps[""])

    def matrix(self, values: Tensor) -> Tensor:
        """The matrix [R, C] of kept values, zero elsewhere."""
        if self._bits is not None:
            return packing.expand(values, self._bits, self._shape, values.dtype)
        return values.new_zeros(self._shape).masked_scatter_(self._keeps[""], values)


def _packs(keep: Tensor) -> bool:
    return keep.is_cpu


class Expanded(torch.autograd.Function):
    """V of its kept values alone; their gradient is that of V in their places."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, places: Places) -> Tensor:
        """V, [R, C]."""
        ctx.places = places
        return places.matrix(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The gradient of the values."""
        return ctx.places.values(gradients[0]), None
