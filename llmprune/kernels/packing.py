"""Packs and unpacks matrices: mask bits, kept values, nibbles, row starts. R rows, C columns, W = ceil(C / 64).

Native where there is a library, else `plain`, with the same bits. Values are copied, never computed with, so
NaN payloads and -0.0 stay.
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
_VALUES = (torch.bfloat16, torch.float16, torch.float32, torch.int8)


class Packed(NamedTuple):
    """A packed matrix as the kernels take it.

    `values`: bf16, fp16, fp32 or int8 [nnz]; int4: uint8, two q + 8 to a byte. `mask`: uint8 [R, 8 W]. `rows`:
    where each row's values start, [R + 1], in values; for int4 in bytes (`byte_rows`). `scale`: bf16
    [R, ceil(C / 128)] for int8 and int4, else None. `bits`: 16 or 32, 8, 4.
    """

    values: Tensor
    mask: Tensor
    rows: Tensor
    scale: Tensor | None
    columns: int
    bits: int


def mask_width(columns: int) -> int:
    """Bytes of a row of the mask."""
    return -(-columns // WORD) * (WORD // 8)


def bits_of(keep: Tensor) -> Tensor:
    """The mask uint8 [R, 8 W] of `keep` bool [R, C]: bit j % 8 of byte j // 8 is column j."""
    rows, columns = keep.shape
    mask = np.zeros((rows, mask_width(columns)), dtype=np.uint8)
    mask[:, : -(-columns // 8)] = np.packbits(keep.numpy(force=True), axis=1, bitorder="little")
    return torch.from_numpy(mask)


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
    if library.available():
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
    """Where each row's values start, and how many there are: [R + 1], int32 as long as they fit, else int64."""
    starts = _starts(counts(mask, columns)[0])
    return starts if int(starts[-1]) >= _WIDE else starts.int()


def byte_rows(mask: Tensor, columns: int) -> Tensor:
    """Where each row's int4 values start, in bytes: int64 [R + 1].

    A count of values does not tell, since every word's values begin on a byte.
    """
    return _starts(counts(mask, columns)[1])


def _starts(each: Tensor) -> Tensor:
    return torch.cat((each.new_zeros(1), each.cumsum(0)))


def compress(weight: Tensor, mask: Tensor) -> Tensor:
    """The values [nnz] that `mask` keeps of `weight` [R, C], in its dtype: bf16, fp16, fp32 or int8."""
    if weight.ndim != 2 or weight.dtype not in _VALUES or len(mask) != len(weight):
        raise ValueError(
            f"cannot pack {weight.dtype} {list(weight.shape)} with a mask of {list(mask.shape)}: "
            "bfloat16, float16, float32 or int8 [rows, columns] is wanted"
        )
    weight = weight.detach().contiguous()
    rows = row_sums(mask, weight.shape[1])
    if not library.available():
        return plain.compress(weight, keep_of(mask, weight.shape[1]))
    values = torch.empty(int(rows[-1]), dtype=weight.dtype)
    matrix = library.matrix_of((values, mask, rows, None), weight.shape[1])
    state = library.loaded()
    code = library.native().llmprune_compress(
        matrix, weight.data_ptr(), state.path, torch.get_num_threads(), values.data_ptr()
    )
    library.demand(code)
    return values


def pack_nibbles(values: Tensor, mask: Tensor, columns: int) -> Tensor:
    """int8 values [nnz] of -8 to 7 as int4: q + 8, two to a byte, every mask word's values on their own bytes."""
    each, taken = counts(mask, columns)
    kept = int(each.sum())
    if values.dtype != torch.int8 or values.shape != (kept,):
        raise ValueError(
            f"int8 [{kept}] is to be packed by this mask, not {values.dtype} {list(values.shape)}"
        )
    if kept and not -8 <= int(values.min()) <= int(values.max()) <= 7:
        raise ValueError(f"int4 holds -8 to 7, not {int(values.min())} to {int(values.max())}")
    values = values.contiguous()
    if not library.available():
        return plain.pack_nibbles(values, mask)
    nibbles = torch.empty(int(taken.sum()), dtype=torch.uint8)
    _nibbles((values, nibbles, mask), columns, (each, taken), True)
    return nibbles


def unpack_nibbles(nibbles: Tensor, mask: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_nibbles`."""
    each, taken = counts(mask, columns)
    wanted = int(taken.sum())
    if nibbles.dtype != torch.uint8 or nibbles.shape != (wanted,):
        raise ValueError(
            f"this mask's int4 values are uint8 [{wanted}], not {nibbles.dtype} {list(nibbles.shape)}"
        )
    nibbles = nibbles.contiguous()
    if not library.available():
        return plain.unpack_nibbles(nibbles, mask)
    values = torch.empty(int(each.sum()), dtype=torch.int8)
    _nibbles((values, nibbles, mask), columns, (each, taken), False)
    return values


def _nibbles(
    tensors: tuple[Tensor, Tensor, Tensor],
    columns: int,
    sizes: tuple[Tensor, Tensor],
    pack: bool,
) -> None:
    values, nibbles, mask = tensors
    rows, starts = _starts(sizes[0]), _starts(sizes[1])
    matrix = library.matrix_of((values, mask, rows, None), columns)
    library.native().llmprune_nibbles(matrix, starts.data_ptr(), values.data_ptr(), nibbles.data_ptr(), pack)


def expand(
    values: Tensor,
    mask: Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
    scale: Tensor | None = None,
) -> Tensor:
    """The dense matrix [R, C] of packed values; int8 and int4 (uint8) values with a scale become q times scale.

    Without a scale int8 and int4 values give q itself, as int8 where that is `dtype`.
    """
    each, taken = counts(mask, shape[1])
    four = values.dtype == torch.uint8
    wanted = int((taken if four else each).sum())
    if values.dtype not in library.KINDS or values.shape != (wanted,) or len(mask) != shape[0]:
        raise ValueError(
            f"values {values.dtype} {list(values.shape)} and a mask of {len(mask)} rows with "
            f"{wanted} {'bytes' if four else 'values'} do not make a matrix {list(shape)}"
        )
    if scale is not None:
        check_scale(scale, shape)
    if scale is None and four:  # without a scale there is nothing to multiply
        values, four, taken = unpack_nibbles(values, mask, shape[1]), False, each
    rows = _starts(taken if four else each)
    bits = 4 if four else 8 * values.element_size()
    packed = Packed(values.contiguous(), mask, rows, scale, shape[1], bits)
    first = dtype if scale is not None or dtype == torch.float32 else values.dtype
    out = torch.empty(shape, dtype=torch.float32 if first == torch.float16 and scale is not None else first)
    if values.dtype == torch.int8 and scale is None:
        out = torch.empty(shape, dtype=torch.int8)
    expand_rows(packed, 0, out)
    return out.to(dtype)


def check_scale(scale: Tensor, shape: tuple[int, int]) -> None:
    """Refuses a scale of another shape or dtype than bf16 [R, ceil(C / 128)], and NaN, Inf and negative ones."""
    wanted = (shape[0], -(-shape[1] // GROUP))
    if scale.dtype != torch.bfloat16 or scale.shape != wanted or not scale.is_contiguous():
        raise ValueError(
            f"the scale must be contiguous bfloat16 {list(wanted)}, not {scale.dtype} {list(scale.shape)}"
        )
    fine = (scale >= 0) & (scale < torch.inf)
    if not bool(fine.all()):
        raise ValueError(f"the scale must be finite and not negative; it has {shown(float(scale[~fine][0]))}")


def expand_rows(packed: Packed, first: int, out: Tensor, path: int = 0) -> None:
    """Writes the rows from `first` on of a checked matrix to `out` [some rows, C], contiguous.

    `out` has the dtype of the values, or is float32, or with a scale bfloat16; `path` is 0 for the fastest.
    """
    last = first + len(out)
    if library.available():
        matrix = library.matrix_of(packed[:4], packed.columns)
        native = library.native()
        tail = torch.empty(native.llmprune_tail_bytes(matrix), dtype=torch.uint8)
        to, threads = library.KINDS[out.dtype], torch.get_num_threads()
        path = path or library.loaded().path
        library.demand(
            native.llmprune_expand(matrix, first, last, to, path, threads, tail.data_ptr(), out.data_ptr())
        )
        return
    values = packed.values[int(packed.rows[first]) : int(packed.rows[last])]
    mask = packed.mask[first:last]
    if packed.bits == 4:
        values = plain.unpack_nibbles(values, mask)
    dense = plain.expand(values, keep_of(mask, packed.columns))
    if packed.scale is not None:
        dense = plain.scaled(dense, packed.scale[first:last], out.dtype)
    out.copy_(dense)
