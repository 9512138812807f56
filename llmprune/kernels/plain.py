"""Packing without native code, in numpy and torch: the same bits. R rows, C columns, W = ceil(C / 64)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_SAME_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def word_counts(mask: Tensor) -> Tensor:
    """Kept values in each word of a mask [R, 8 W]: int64 [R, W]."""
    if mask.is_cpu and hasattr(np, "bitwise_count"):
        return torch.from_numpy(np.bitwise_count(mask.numpy().view(np.uint64)).astype(np.int64))
    return byte_counts(mask).view(len(mask), -1, 8).sum(-1, dtype=torch.int64)


def byte_counts(mask: Tensor) -> Tensor:
    """How many bits are set in each byte: uint8, the shape of the mask; on any device."""
    pairs = mask - ((mask >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (nibbles + (nibbles >> 4)) & 0x0F


def bits_behind(mask: Tensor, columns: int) -> bool:
    """Whether a mask has bits behind its last column."""
    whole, rest = divmod(columns, 8)
    tail = mask[:, whole:].clone()
    if rest:
        tail[:, 0] >>= rest
    return bool(tail.any())


def compress(weight: Tensor, keep: Tensor) -> Tensor:
    """The kept values of `weight` [R, C], by `keep` bool [R, C]."""
    same = weight.view(_SAME_WIDTH[weight.element_size()])  # integers are copied as they are
    return same.masked_select(keep).view(weight.dtype)


def expand(values: Tensor, keep: Tensor) -> Tensor:
    """Dense [R, C] with `values` where `keep` is set, and zeros."""
    same = values.view(_SAME_WIDTH[values.element_size()])
    dense = torch.zeros(keep.shape, dtype=same.dtype)
    dense.masked_scatter_(keep, same)  # ten times faster than by index
    return dense.view(values.dtype)


def scaled(dense: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """q [R, C] times its scale [R, ceil(C / 128)]."""
    wide = scale.float().repeat_interleave(128, dim=1)[:, : dense.shape[1]]
    return (dense.float() * wide).to(dtype)


def filled(mask: Tensor) -> Tensor:
    """bool: which nibbles of int4 values hold one; the last of a word with an odd count does not."""
    kept = word_counts(mask).flatten()
    behind = ((kept + 1) // 2).cumsum(0) * 2
    full = torch.ones(int(behind[-1]), dtype=torch.bool)
    full[behind[kept % 2 == 1] - 1] = False
    return full


def pack_nibbles(values: Tensor, mask: Tensor) -> Tensor:
    """Bytes q [nnz] to nibbles q + 8, two to a byte, every word's on bytes of its own."""
    full = filled(mask)
    nibbles = torch.zeros(len(full), dtype=torch.uint8)
    nibbles.masked_scatter_(full, (values + 8).view(torch.uint8))
    return nibbles[0::2] | nibbles[1::2] << 4


def unpack_nibbles(nibbles: Tensor, mask: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    single = torch.stack((nibbles & 15, nibbles >> 4), dim=1).flatten()
    return single.masked_select(filled(mask)).view(torch.int8) - 8
