"""Packs and unpacks matrices: kept values and nibbles. R rows, C columns, W = ceil(C / 64).

Native where there is a library, else `plain`, with the same bits. Values are copied, never computed with, so
NaN payloads and -0.0 stay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.kernels import gpu, library, plain
from llmprune.kernels.layout import (
    Packed,
    bits_of,
    byte_rows,
    check,
    check_scale,
    counts,
    full_mask,
    keep_of,
    row_entries,
    row_sums,
    starts_of,
)

__all__ = [
    "Packed",
    "bits_of",
    "byte_rows",
    "compress",
    "expand",
    "expand_rows",
    "full_mask",
    "keep_of",
    "pack_nibbles",
    "row_sums",
    "unpack_nibbles",
]

_VALUES = (torch.bfloat16, torch.float16, torch.float32, torch.int8)


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
    """int8 values [nnz] of -8 to 7 as int4: q + 8, two to a byte, every mask word's on their own bytes."""
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
    rows, starts = starts_of(sizes[0]), starts_of(sizes[1])
    matrix = library.matrix_of((values, mask, rows, None), columns)
    library.native().llmprune_nibbles(matrix, starts.data_ptr(), values.data_ptr(), nibbles.data_ptr(), pack)


def expand(
    values: Tensor,
    mask: Tensor | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
    scale: Tensor | None = None,
) -> Tensor:
    """The dense matrix [R, C] of packed values; int8 and int4 (uint8) ones with a scale become q times scale.

    Without a scale they give q itself. Without a mask (int8 and int4) every weight is kept.
    """
    if mask is None and scale is not None:
        return _expand_whole(values, shape, dtype, scale)
    mask = full_mask(*shape) if mask is None else mask
    each, taken = counts(mask, shape[1])
    four = values.dtype == torch.uint8
    wanted = int((taken if four else each).sum())
    if values.dtype not in library.KINDS or values.shape != (wanted,) or len(mask) != shape[0]:
        raise ValueError(
            f"values {values.dtype} {list(values.shape)} and a mask of {len(mask)} rows with "
            f"{wanted} {'bytes' if four else 'values'} do not make a matrix {list(shape)}"
        )
    bits, made = 8 * values.element_size(), values.dtype
    if scale is not None:
        check_scale(scale, shape)
        bits, made = 4 if four else 8, dtype if dtype == torch.bfloat16 else torch.float32
    elif four and not values.is_cpu:
        bits, made = 4, torch.int8
    elif four:  # q itself is wanted, of bytes
        values, taken, bits, made = unpack_nibbles(values, mask, shape[1]), each, 8, torch.int8
    packed = Packed(values.contiguous(), mask, starts_of(taken if four else each), scale, shape[1], bits)
    out = torch.empty(shape, dtype=made, device=values.device)
    expand_rows(packed, 0, out)
    return out.to(dtype)


def _expand_whole(values: Tensor, shape: tuple[int, int], dtype: torch.dtype, scale: Tensor) -> Tensor:
    """The dense matrix of int8 or int4 values without a mask."""
    bits = 4 if values.dtype == torch.uint8 else 8
    check(values, None, None, scale, shape, bits)
    out = torch.empty(shape, dtype=dtype if dtype == torch.bfloat16 else torch.float32)
    expand_rows(Packed(values.contiguous(), None, None, scale, shape[1], bits), 0, out)
    return out.to(dtype)


def expand_rows(packed: Packed, first: int, out: Tensor, path: int = 0) -> None:
    """Writes the rows from `first` on of a checked matrix to `out` [some rows, C], contiguous.

    `out` has the dtype of the values, or is float32, or with a scale bfloat16; `path` is 0 for the fastest.
    """
    last = first + len(out)
    if not out.is_cpu:
        gpu.expand_rows(packed, first, out)
        return
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
    if packed.mask is None or packed.rows is None:
        each, mask = row_entries(packed.columns, packed.bits), full_mask(len(out), packed.columns)
        values = packed.values[first * each : last * each]
    else:
        values = packed.values[int(packed.rows[first]) : int(packed.rows[last])]
        mask = packed.mask[first:last]
    if packed.bits == 4:
        values = plain.unpack_nibbles(values, mask)
    dense = plain.expand(values, keep_of(mask, packed.columns))
    if packed.scale is not None:
        dense = plain.scaled(dense, packed.scale[first:last], out.dtype)
    out.copy_(dense)
