"""Packed tensors: of a pruned matrix the kept values and a bit per weight are stored, nothing else.

A tensor X becomes X, now 1-D with the kept values of its rows one after the other, `X_mask` with a bit per
weight, `X_rows` with the number of values before each row and, where values are quantised, `X_scale`. What is
kept is said by the bits, so zeros among the kept values survive. Of a tensor whose weights are all kept, and
rounded to 8 or 4 bits, there are only X and `X_scale`. R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmprune.common.messages import shown
from llmprune.kernels import layout as bits_and_rows
from llmprune.kernels import packing
from llmprune.kernels.layout import GROUP, WORD, keep_of
from llmprune.numerics import grids

PACKED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PARTS = ("", "_mask", "_rows", "_scale")  # what is added to the name of a packed tensor


@dataclass(frozen=True)
class Layout:
    """How a tensor of a dense checkpoint lies in a packed one.

    Attributes:
        rows: R; of a stack the rows of all its matrices, one matrix after the other.
        columns: C.
        dtype: of the dense tensor.
        stacked: how many matrices a stack holds; 0 for a tensor that is one matrix.
        transposed: whether the dense tensor holds its matrices as [C, R].
        bits: of a value.
        whole: every weight is kept, and there is no mask; of rounded values only.
    """

    rows: int
    columns: int
    dtype: torch.dtype
    stacked: int = 0
    transposed: bool = False
    bits: int = 16
    whole: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense tensor."""
        size = (self.rows // max(1, self.stacked), self.columns)
        size = size[::-1] if self.transposed else size
        return (self.stacked, *size) if self.stacked else size

    @property
    def words(self) -> int:
        """Mask words of a row."""
        return -(-self.columns // WORD)

    @property
    def parts(self) -> tuple[str, ...]:
        """What is added to the name of the tensor for each of its parts."""
        masked = () if self.whole else ("_mask", "_rows")
        return ("", *masked, *(("_scale",) if self.bits != 16 else ()))

    def found(self, name: str, names: Container[str]) -> Layout | None:
        """The layout by which a tensor is packed among tensors of these names; None where it is dense."""
        if f"{name}_mask" in names:
            return replace(self, whole=False)
        return replace(self, whole=True) if self.bits != 16 and f"{name}_scale" in names else None

    def matrix(self, dense: Tensor) -> Tensor:
        """The rows [R, C] of a dense tensor."""
        return (dense.mT if self.transposed else dense).reshape(self.rows, self.columns)

    def dense(self, matrix: Tensor) -> Tensor:
        """The dense tensor of the rows [R, C]."""
        if not self.transposed:
            return matrix.view(self.shape)
        stacked = matrix.view(*((self.stacked,) if self.stacked else ()), -1, self.columns)
        return stacked.mT.contiguous()

    def bytes(self, mask: Tensor) -> int:
        """Bytes of all parts of the packed tensor with this mask."""
        each, taken = bits_and_rows.counts(mask, self.columns)
        return self.bytes_of(int(each.sum()), int(taken.sum()))

    def bytes_of(self, kept: int, taken: int = 0) -> int:
        """Bytes of all parts with so many kept values; `taken`: the bytes that they take as int4."""
        values = {16: self.dtype.itemsize * kept, 8: kept, 4: taken}[self.bits]
        scales = 0 if self.bits == 16 else 2 * self.rows * -(-self.columns // GROUP)
        if self.bits != 16 and kept == self.rows * self.columns:
            return values + scales
        starts = (8 if kept >= 1 << 31 else 4) * (self.rows + 1)
        return values + 8 * self.rows * self.words + starts + scales


def pack(dense: Tensor, mask: Tensor, layout: Layout, scales: Tensor | None = None) -> dict[str, Tensor]:
    """The parts of a packed tensor, by what is added to its name; its values are rounded where bits are few.

    Args:
        dense: the tensor.
        mask: its bits, uint8 [R, 8 ceil(C / 64)]; bit j % 8, the least significant first, of byte j // 8 is
            column j, and 1 means kept.
        layout: of the tensor.
        scales: those its values were rounded with, bfloat16 [R, ceil(C / 128)]; None to choose some.
    """
    matrix, rows = layout.matrix(dense).contiguous(), bits_and_rows.row_sums(mask, layout.columns)
    if layout.bits == 16:
        return {"": packing.compress(matrix, mask), "_mask": mask, "_rows": rows}
    matrix = matrix.float().masked_fill(~keep_of(mask, layout.columns), 0.0)
    scales = grids.scales_of(matrix, layout.bits, GROUP) if scales is None else scales
    values = packing.compress(grids.codes_of(matrix, scales, layout.bits, GROUP), mask)
    values = packing.pack_nibbles(values, mask, layout.columns) if layout.bits == 4 else values
    if int(rows[-1]) == matrix.numel():
        return {"": values, "_scale": scales}
    return {"": values, "_mask": mask, "_rows": rows, "_scale": scales}


def unpack(parts: Mapping[str, Tensor], layout: Layout, name: str) -> Tensor:
    """The dense tensor of packed parts.

    Raises:
        ValueError: parts that do not fit together; the message names the tensor.
    """
    check(parts, layout, name)
    values, mask = parts[""], parts.get("_mask")
    shape = (layout.rows, layout.columns)
    return layout.dense(packing.expand(values, mask, shape, layout.dtype, parts.get("_scale")))


def check(parts: Mapping[str, Tensor], layout: Layout, name: str) -> None:
    """Raise `ValueError` unless the parts of a packed tensor fit together in every bit."""
    try:
        bits_and_rows.check(
            parts[""],
            parts.get("_mask"),
            parts.get("_rows"),
            parts.get("_scale"),
            (layout.rows, layout.columns),
            layout.bits,
        )
    except ValueError as error:
        raise ValueError(f"the packed tensor {shown(name)} is damaged: {error}") from None


def read_parts(load: Callable[[str], Tensor], name: str, layout: Layout) -> dict[str, Tensor]:
    """The parts of a packed tensor, each read by its name."""
    return {part: load(name + part) for part in layout.parts}


def widened(bits: Tensor, columns: int) -> Tensor:
    """The bits of `masks.safetensors`, uint8 [R, ceil(C / 8)], with rows of whole words."""
    room = 8 * -(-columns // WORD) - bits.shape[1]
    return torch.nn.functional.pad(bits, (0, room)).contiguous() if room else bits.contiguous()
