"""Layers whose weights stay packed in memory. R outputs, C inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.checkpoint.packed import PARTS, Layout, check
from llmprune.kernels.layout import GROUP, Packed, mask_width
from llmprune.kernels.packing import expand
from llmprune.kernels.products import packed_linear
from llmprune.kernels.ways import Plan
from llmprune.runtime.standins import Standin, starts_of


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
        self.register_buffer(
            "weight_mask", torch.empty(rows, mask_width(columns), dtype=torch.uint8, device="meta")
        )
        self.register_buffer("weight_rows", torch.empty(rows + 1, dtype=sums, device="meta"))
        if layout.bits != 16:
            scales = torch.empty(rows, -(-columns // GROUP), dtype=torch.bfloat16, device="meta")
            self.register_buffer("weight_scale", scales)
        self._starts: Tensor | None = None
        self.plan: Plan | None = None  # on a GPU, where `accelerate` has found a faster way

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Move the parts; what was made of them, and measured, does not hold elsewhere."""
        before = self._buffers["weight"]
        super()._apply(fn, recurse)
        after = self._buffers["weight"]
        assert before is not None and after is not None
        if (before.device, before.dtype) != (after.device, after.dtype):
            self._starts = self.plan = None
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
        return layout.dense(expand(parts[""], parts["_mask"], shape, layout.dtype, parts.get("_scale")))

    def packed(self) -> Packed:
        """The matrix as the kernels take it."""
        parts, layout = self.parts(), self.layout
        if self._starts is None:
            self._starts = starts_of(parts, layout)
        bits = parts[""].dtype.itemsize * 8 if layout.bits == 16 else layout.bits
        return Packed(parts[""], parts["_mask"], self._starts, parts.get("_scale"), layout.columns, bits)

    def forward(self, x: Tensor) -> Tensor:
        """Of inputs [..., C] the outputs [..., R]."""
        packed = self.packed()
        y = packed_linear(x, *packed) if self.plan is None else self.plan.product(x, packed)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """For printing a model."""
        layout = self.layout
        return f"in_features={layout.columns}, out_features={layout.rows}, bits={layout.bits}"
