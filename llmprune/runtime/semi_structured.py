"""Linear layers whose weight holds 2:4, with torch's semi-structured tensors for many rows of x.

A GPU multiplies 2:4 matrices with matrix instructions of their own, which pay where the product is bound by
arithmetic. n rows of x, R outputs, C inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from llmprune.kernels.ways import pick

DTYPES = (torch.bfloat16, torch.float16)
_CLASSES = {
    "cusparselt": SparseSemiStructuredTensorCUSPARSELT,
    "cutlass": SparseSemiStructuredTensorCUTLASS,
}


def holds_two_of_four(weight: Tensor) -> bool:
    """Whether at most two of every four neighbouring weights in a row [R, C] are not zero."""
    if weight.ndim != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight != 0).view(len(weight), -1, 4).sum(-1) <= 2).all())


def backends() -> tuple[str, ...]:
    """The backends that this torch was built with."""
    return tuple(_CLASSES) if torch.backends.cusparselt.is_available() else ("cutlass",)


def converted(weight: Tensor, backend: str) -> Any:
    """The semi-structured tensor of a weight [R, C] on a GPU, contiguous.

    Raises:
        RuntimeError: the backend does not take its size, or the GPU has no such instructions.
    """
    return _CLASSES[backend].from_dense(weight.detach().contiguous())


class TwoOfFourLinear(nn.Module):
    """A linear layer with its weight twice: dense, and semi-structured for the numbers of rows it wins at.

    `weight` and `bias` are those of the layer it stands for, so the model is saved as before.

    Args:
        linear: the layer.
        sparse: its weight as a semi-structured tensor.
        steps: a number of rows of x, and whether at most so many take `sparse`, in ascending order.
    """

    def __init__(self, linear: nn.Linear, sparse: Tensor, steps: Sequence[tuple[int, bool]]) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.steps = tuple(steps)
        self.sparse: Tensor | None = sparse
        self.train(linear.training)

    def _apply(self, fn: Any, recurse: bool = True) -> TwoOfFourLinear:
        """Move the dense weight; elsewhere, or in another dtype, what was measured does not hold."""
        before = self.weight.device, self.weight.dtype
        super()._apply(fn, recurse)
        if before != (self.weight.device, self.weight.dtype):
            self.sparse = None
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Of inputs [..., C] the outputs [..., R]."""
        if self.sparse is not None and pick(self.steps, x.numel() // self.in_features):
            return nn.functional.linear(x, self.sparse, self.bias)
        return nn.functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """For printing a model."""
        ways = ", ".join(f"{'2:4' if wins else 'dense'} to {most}" for most, wins in self.steps)
        return f"in_features={self.in_features}, out_features={self.out_features}, rows of x: {ways}"
