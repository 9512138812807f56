"""The parts of a packed matrix: mask bits, row starts, and whether they fit.

R rows, C columns, W = ceil(C / 64) words of a row's mask.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmprune.common.messages import shown
from llmprune.kernels import library, plain

GROUP = 128  # columns per scale
WORD = 64  # columns per word of the mask
_WIDE = 2**31  # from so many values on, row starts are int64
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_DTYPES = {32: (torch.float32,), 16: FLOATS, 8: (torch.int8,), 4: (torch.uint8,)}


class Packed(NamedTuple):
    """A packed matrix as the kernels take it.

    `values`: bf16, fp16, fp32 or int8 [nnz]; int4: uint8, two q + 8 to a byte. `mask`: uint8 [R, 8 W].
    `rows`: where each row's values start, [R + 1], in values; for int4 in bytes (`byte_rows`). `scale`: bf16
    [R, ceil(C / 128)] for int8 and int4, else None. `bits`: 16 or 32, 8, 4. Of int8 and int4 `mask` and
    `rows` are None where every weight is kept.
    """

    values: Tensor
    mask: Tensor | None
    rows: Tensor | None
    scale: Tensor | None
    columns: int
    bits: int

    @property
    def height(self) -> int:
        """R."""
        first = self.scale if self.mask is None else self.mask
        assert first is not None
        return len(first)


def mask_width(columns: int) -> int:
    """Bytes of a row of the mask."""
    return -(-columns // WORD) * (WORD // 8)


def bits_of(keep: Tensor) -> Tensor:
    """The mask uint8 [R, 8 W] of `keep` bool [R, C]: bit j % 8 of byte j // 8 is column j."""
    rows, columns = keep.shape
    mask = np.zeros((rows, mask_width(columns)), dtype=np.uint8)
    mask[:, : -(-columns // 8)] = np.packbits(keep.numpy(force=True), axis=1, bitorder="little")
    return torch.from_numpy(mask)


def full_mask(rows: int, columns: int) -> Tensor:
    """The mask uint8 [R, 8 W] that keeps every weight."""
    return bits_of(torch.ones((1, columns), dtype=torch.bool)).repeat(rows, 1)


def row_entries(columns: int, bits: int) -> int:
    """Entries of the values of a row of which every weight is kept: bytes for int4."""
    return columns if bits != 4 else columns // WORD * (WORD // 2) + (columns % WORD + 1) // 2


def keep_of(mask: Tensor, columns: int) -> Tensor:
    """`keep` bool [R, C] of a mask."""
    bits = np.unpackbits(mask.numpy(), axis=1, count=columns, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_))


def counts(mask: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Kept values of each row, and the bytes they take as int4: int64 [R] both.

    Raises:
        ValueError: the mask has another shape than [R, 8 W], or bits behind its last column.
    """
    wanted = mask_width(columns)
    if mask.dtype != torch.uint8 or mask.ndim != 2 or mask.shape[1] != wanted or not mask.is_contiguous():
        raise ValueError(
            f"the mask of {columns} columns must be contiguous uint8 [rows, {wanted}], "
            f"not {mask.dtype} {list(mask.shape)}"
        )
    if mask.is_cpu and library.available():
        values, taken = (torch.empty(len(mask), dtype=torch.int64) for _ in range(2))
        behind = library.native().llmprune_counts(
            mask.data_ptr(), len(mask), columns, values.data_ptr(), taken.data_ptr()
        )
    else:
        words = plain.word_counts(mask)
        values, taken = words.sum(dim=1), ((words + 1) // 2).sum(dim=1)
        behind = plain.bits_behind(mask, columns)
    if behind:
        raise ValueError(f"the mask has bits set behind column {columns}: it belongs to another shape")
    return values, taken


def row_sums(mask: Tensor, columns: int) -> Tensor:
    """Where each row's values start, and how many there are: [R + 1], int32 while they fit, else int64."""
    starts = starts_of(counts(mask, columns)[0])
    return starts if int(starts[-1]) >= _WIDE else starts.int()


def byte_rows(mask: Tensor, columns: int) -> Tensor:
    """Where each row's int4 values start, in bytes: int64 [R + 1].

    A count of values does not tell, since every word's values begin on a byte.
    """
    return starts_of(counts(mask, columns)[1])


def starts_of(each: Tensor) -> Tensor:
    """Exclusive sums, and the whole: int64 [R + 1]."""
    return torch.cat((each.new_zeros(1), each.cumsum(0)))


def check(
    values: Tensor,
    mask: Tensor | None,
    rows: Tensor | None,
    scale: Tensor | None,
    shape: tuple[int, int],
    bits: int,
) -> None:
    """Refuses a packed matrix whose parts do not fit one another, in one line. Reads every bit of the mask.

    `rows` are sums of values, also for int4, as a file has them.
    """
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"a packed matrix has rows and columns, not the shape {list(shape)}")
    check_parts(values, mask, rows, bits)
    if mask is not None and len(mask) != shape[0]:
        raise ValueError(f"the mask has {len(mask)} rows, the matrix {shape[0]}")
    if (scale is None) != (bits > 8):
        raise ValueError(f"values of {bits} bits have {'a' if bits <= 8 else 'no'} scale")
    if scale is not None:
        check_scale(scale, shape)
    if mask is None or rows is None:
        wanted = shape[0] * row_entries(shape[1], bits)
        if len(values) != wanted:
            raise ValueError(
                f"a matrix {list(shape)} without a mask has {wanted} entries of {values.dtype},"
                f" not {len(values)}"
            )
        return
    each, taken = counts(mask, shape[1])
    kept = each.cumsum(0)
    if int(rows[0]) != 0 or not torch.equal(rows[1:].long(), kept):
        raise ValueError("the row starts do not fit the mask: they must be the sums of its bits, from 0 on")
    wanted = int(taken.sum() if bits == 4 else kept[-1])
    if len(values) != wanted:
        raise ValueError(
            f"the mask keeps {int(kept[-1])} values, which are {wanted} entries of {values.dtype},"
            f" not {len(values)}"
        )


def checked(
    values: Tensor,
    mask: Tensor | None,
    rows: Tensor | None,
    scale: Tensor | None,
    shape: tuple[int, int],
    bits: int,
) -> Packed:
    """A packed matrix for `packed_linear`, checked. `rows` as in a file: for int4 byte starts are made."""
    check(values, mask, rows, scale, shape, bits)
    starts = byte_rows(mask, shape[1]) if bits == 4 and mask is not None else rows
    return Packed(values, mask, starts, scale, shape[1], bits)


def check_parts(values: Tensor, mask: Tensor | None, rows: Tensor | None, bits: int) -> None:
    """What costs nothing to look at: dtypes, dimensions, whether the parts are contiguous."""
    if bits not in _DTYPES or values.dtype not in _DTYPES[bits]:
        raise ValueError(f"values of {bits} bits cannot be {values.dtype}; bits are 32, 16, 8 or 4")
    if (mask is None) != (rows is None) or (mask is None and bits > 8):
        raise ValueError(f"values of {bits} bits need a mask and row starts; those of 8 and 4 may lack both")
    for name, part, dimensions in (("values", values, 1), ("mask", mask, 2), ("rows", rows, 1)):
        if part is None:
            continue
        if part.ndim != dimensions or not part.is_contiguous() or part.device != values.device:
            raise ValueError(
                f"{name} must be contiguous, with {dimensions} dimension{'s' * (dimensions > 1)}, on"
                f" {values.device}, not {list(part.shape)} on {part.device}"
            )
    if mask is None or rows is None:
        return
    if mask.dtype != torch.uint8 or rows.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"the mask must be uint8 and the rows int32 or int64, not {mask.dtype} and {rows.dtype}"
        )
    if len(rows) != len(mask) + 1:
        raise ValueError(f"{len(mask)} rows of mask want {len(mask) + 1} row starts, not {len(rows)}")


def check_scale(scale: Tensor, shape: tuple[int, int]) -> None:
    """Refuses another shape or dtype than bf16 [R, ceil(C / 128)], and NaN, Inf and negative scales."""
    wanted = (shape[0], -(-shape[1] // GROUP))
    if scale.dtype != torch.bfloat16 or scale.shape != wanted or not scale.is_contiguous():
        raise ValueError(
            f"the scale must be contiguous bfloat16 {list(wanted)}, not {scale.dtype} {list(scale.shape)}"
        )
    fine = (scale >= 0) & (scale < torch.inf)
    if not bool(fine.all()):
        raise ValueError(f"the scale must be finite and not negative; it has {shown(float(scale[~fine][0]))}")
