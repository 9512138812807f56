"""Packed matrices off the CPU, by operations of torch alone: first slots, blocks of dense rows.

They run on any device, and a CPU tests them. R rows, C columns, W = ceil(C / 64) words of a row's mask.
A slot is the place of a value among those of its row; for int4 it is a nibble, and behind a word with an odd
number of them one is left free.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.kernels import plain
from llmprune.kernels.layout import WORD, Packed

HALF = 32  # columns for which the first slot is counted beforehand
_AT_ONCE = 1 << 24  # weights: unpacking takes some 20 bytes for each
_MOST_SLOTS = 1 << 16  # of a row: what 16 bits hold
_SAME_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def half_starts(mask: Tensor, bits: int) -> Tensor:
    """The first slot of every 32 columns, counted from the row's first: int32 [R, 2 W]."""
    halves = plain.byte_counts(mask).view(len(mask), -1, 2, 4).sum(-1, dtype=torch.int32)
    words = halves.sum(-1, dtype=torch.int32)
    taken = (words + 1) // 2 * 2 if bits == 4 else words
    starts = taken.cumsum(1, dtype=torch.int32) - taken
    return torch.stack((starts, starts + halves[..., 0]), dim=-1).flatten(1)


def prepared(packed: Packed) -> tuple[Tensor, Tensor]:
    """What the kernels in `decode` want beside the parts of a checked matrix.

    Returns:
        The first slot of every 32 columns in the row, the 16 bits of it as int16 [R, 2 W]; and the first slot
        of every row, int32 or int64 [R].

    Raises:
        ValueError: every weight is kept, so that there is no mask, or a row may have 65536 slots or more.
    """
    if packed.mask is None or packed.rows is None:
        raise ValueError("every weight is kept, and a matrix without a mask has no kernel of Triton")
    if packed.columns + -(-packed.columns // WORD) >= _MOST_SLOTS:
        raise ValueError(f"rows of {packed.columns} columns are too long for the kernel of few rows of x")
    four = packed.bits == 4
    slots = packed.rows[:-1] * 2 if four else packed.rows[:-1]
    narrow = len(packed.values) * (2 if four else 1) < 1 << 31
    starts = half_starts(packed.mask, packed.bits).to(torch.int16)
    return starts, slots.to(torch.int32 if narrow else torch.int64)


def expand_rows(packed: Packed, first: int, out: Tensor) -> None:
    """Writes the rows from `first` on of a checked matrix to `out` [n, C], contiguous.

    Values are copied bit by bit where `out` has their dtype. Nothing waits for the GPU, so that a CUDA graph
    can hold it; no bad row start is followed.
    """
    step = max(1, _AT_ONCE // packed.columns)
    for start in range(0, len(out), step):
        _expand_some(packed, first + start, out[start : start + step])


def _expand_some(packed: Packed, first: int, out: Tensor) -> None:
    last, four = first + len(out), packed.bits == 4
    mask, rows = _mask_and_rows(packed, first, last)
    bit = torch.arange(8, dtype=torch.uint8, device=mask.device)
    keep = ((mask[..., None] >> bit) & 1).bool().view(len(out), -1, HALF)
    slot = keep.cumsum(-1, dtype=torch.int64) - 1 + half_starts(mask, packed.bits)[..., None]
    slot += (rows.long() * (2 if four else 1))[:, None, None]
    keep, slot = (part.flatten(1)[:, : packed.columns] for part in (keep, slot))
    made = torch.int8 if four else packed.values.dtype
    out.copy_(_values_at(packed, slot).masked_fill_(~keep, 0).view(made))
    if packed.scale is not None:
        out.copy_(plain.scaled(out, packed.scale[first:last], out.dtype))


def _mask_and_rows(packed: Packed, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Of some rows the mask, and where their values start; made up where every weight is kept."""
    if packed.mask is not None and packed.rows is not None:
        return packed.mask[first:last], packed.rows[first:last]
    device, columns, words = packed.values.device, packed.columns, -(-packed.columns // WORD)
    mask = torch.full((last - first, words * WORD // 8), 255, dtype=torch.uint8, device=device)
    half = WORD // 2  # bytes of a word's int4 values
    each = columns // WORD * half + (columns % WORD + 1) // 2 if packed.bits == 4 else columns
    return mask, torch.arange(first, last, device=device) * each


def _values_at(packed: Packed, slot: Tensor) -> Tensor:
    """The values in some slots, as integers of their width; int4 as int8."""
    same = packed.values.view(_SAME_WIDTH[packed.values.element_size()])
    if not len(same):
        return torch.zeros(slot.shape, dtype=same.dtype, device=slot.device)
    if packed.bits != 4:
        return same[slot.clamp_(0, len(same) - 1)]
    slot = slot.clamp_(0, 2 * len(same) - 1)
    nibble = (same[slot >> 1] >> ((slot & 1) * 4).to(torch.uint8)) & 15
    return nibble.view(torch.int8) - 8
