"""Layers whose weights stay packed in memory. R outputs, C inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.checkpoint.packed_tensor import PARTS, Layout, check
from llmprune.kernels.layout import GROUP, Packed, mask_width
from llmprune.kernels.packing import expand
from llmprune.kernels.products import Prepared, packed_linear
from llmprune.kernels.ways import Plan
from llmprune.runtime.standins import Standin, starts_of
from llmprune.runtime.together import Together


class PackedLinear(nn.Module):
    """A linear layer whose weight stays packed: `y = x W^T + b`.

    The parts are buffers with the names and dtypes they have in the file. Once they are loaded and checked,
    `weight` stands for the dense weight: some models read it instead of calling the layer.

    Args:
        layout: of the weight.
        kept: how many entries its values have.
        bias: of the layer.
    """

    def __init__(self, layout: Layout, kept: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.layout, self._ready = layout, False
        self.in_features, self.out_features, self.bias = layout.columns, layout.rows, bias
        values = {16: layout.dtype, 8: torch.int8, 4: torch.uint8}[layout.bits]
        rows, columns = layout.rows, layout.columns
        sums = torch.int64 if kept >= 1 << 31 else torch.int32
        # A module refuses a buffer with the name of a property.
        self._buffers["weight"] = torch.empty(kept, dtype=values, device="meta")
        if not layout.whole:
            mask = torch.empty(rows, mask_width(columns), dtype=torch.uint8, device="meta")
            self.register_buffer("weight_mask", mask)
            self.register_buffer("weight_rows", torch.empty(rows + 1, dtype=sums, device="meta"))
        if layout.bits != 16:
            scales = torch.empty(rows, -(-columns // GROUP), dtype=torch.bfloat16, device="meta")
            self.register_buffer("weight_scale", scales)
        self._counted: tuple[Tensor, Tensor] | None = None
        self._made: tuple[list[int], Prepared] | None = None
        self.together: Together | None = None
        self.plan: Plan | None = None  # on a GPU, where `accelerate` has found a faster way

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Move the parts; what was made of them, and measured, does not hold elsewhere."""
        before = self._buffers["weight"]
        super()._apply(fn, recurse)
        after = self._buffers["weight"]
        assert before is not None and after is not None
        if (before.device, before.dtype) != (after.device, after.dtype):
            self._counted = self._made = self.plan = None
        return self

    @property
    def weight(self) -> Any:
        """The values while they are loaded; from then on a stand-in for the dense weight."""
        values = self._buffers["weight"]
        if not self._ready or values is None:
            return values
        return Standin(torch.Size(self.layout.shape), self.layout.dtype, self.dense, values.device)

    def parts(self) -> dict[str, Tensor]:
        """The parts by what is added to the name."""
        found = {part: self._buffers.get(f"weight{part}") for part in PARTS}
        return {part: tensor for part, tensor in found.items() if tensor is not None}

    def check(self, name: str) -> None:
        """Raise `ValueError` unless the parts fit together in every bit; before the first product."""
        check(self.parts(), self.layout, name)
        self._ready = True

    def dense(self) -> Tensor:
        """The dense tensor."""
        parts, layout = self.parts(), self.layout
        shape = (layout.rows, layout.columns)
        return layout.dense(expand(parts[""], parts.get("_mask"), shape, layout.dtype, parts.get("_scale")))

    def packed(self) -> Packed:
        """The matrix as the kernels take it."""
        parts, layout = self.parts(), self.layout
        starts = None if layout.whole else self._starts(parts)
        bits = parts[""].dtype.itemsize * 8 if layout.bits == 16 else layout.bits
        return Packed(parts[""], parts.get("_mask"), starts, parts.get("_scale"), layout.columns, bits)

    def _starts(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Where the values of each row begin; of 4 bits made from the mask, and kept as long as that."""
        if self.layout.bits != 4:
            return parts["_rows"]
        mask, known = parts["_mask"], self._counted
        if known is None or known[0] is not mask:
            known = self._counted = mask, starts_of(parts, self.layout)
        return known[1]

    def prepared(self) -> Prepared:
        """The matrix, ready for few rows of inputs; made anew when one of the parts has moved."""
        key = [part.data_ptr() for part in self._buffers.values() if part is not None]
        made = self._made
        if made is None or made[0] != key:
            made = self._made = key, Prepared([self.packed()])
        return made[1]

    def product(self, x: Tensor) -> Tensor:
        """y [..., R] of x [..., C], without the bias."""
        if x.is_cpu and not torch.compiler.is_compiling():
            prepared = self.prepared()
            if prepared.takes(x):
                return prepared(x)[0]
        return packed_linear(x, *self.packed())

    def forward(self, x: Tensor) -> Tensor:
        """Of inputs [..., C] the outputs [..., R]."""
        if self.plan is not None:
            y = self.plan.product(x, self.packed())
        else:
            y = self.product(x) if self.together is None else self.together.product(self, x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}  # it holds addresses

    def extra_repr(self) -> str:
        """For printing a model."""
        layout = self.layout
        return f"in_features={layout.columns}, out_features={layout.rows}, bits={layout.bits}"


def together(siblings: Sequence[PackedLinear]) -> None:
    """Lets packed layers of one parent share products of the same input."""
    if len(siblings) > 1:
        shared = Together()
        for layer in siblings:
            layer.together = shared
