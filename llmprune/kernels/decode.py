"""Triton kernels for packed matrices on a GPU: products with few rows of x, and dense rows.

A lane reads a word of 32 bits of the mask and takes the columns of a few neighbouring bits. The first slot of
the word, which was counted beforehand, and the bits below give the slot of its first value; each kept one
moves it on. n rows of x, R outputs, C inputs. Triton comes with torch for NVIDIA GPUs; nothing imports this
file before it is known to be there. Its kernels cannot have annotations but `tl.constexpr`.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmprune.kernels.layout import GROUP, Packed

MOST = 16  # rows of x that a product takes: what a matrix instruction takes at least
MOST_ROWS = tl.constexpr(MOST)
COLUMNS = tl.constexpr(GROUP)  # of a step: its weights share a scale
PER_LANE = tl.constexpr(4)  # columns
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton reads it where kernels are defined
_DENSE = (8, 4)  # outputs of a program, and its warps


@triton.jit
def _bits_set(word, NATIVE: tl.constexpr):
    if NATIVE:
        asm: tl.constexpr = "popc.b32 $0, $1;"
        word = tl.inline_asm_elementwise(asm, "=r,r", [word], dtype=tl.uint32, is_pure=True, pack=1)
    else:
        word = word - ((word >> 1) & 0x55555555)
        word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
        word = (word + (word >> 4)) & 0x0F0F0F0F
        word = word + (word >> 8)
        word = (word + (word >> 16)) & 0x3F
    return word


@triton.jit
def _words(mask, starts, at, inside):
    """A word of the mask, and the first slot of its columns, for every lane."""
    word = tl.load(mask + at, mask=inside, other=0)
    return word, tl.load(starts + at, mask=inside, other=0).to(tl.uint32)


@triton.jit
def _value(values, slot, kept, FOUR: tl.constexpr):
    """The values in some slots, 0 where a column is not kept."""
    if FOUR:
        byte = tl.load(values + (slot >> 1), mask=kept, other=0x88).to(tl.int32)
        value = ((byte >> ((slot & 1) * 4).to(tl.int32)) & 15) - 8
    else:
        value = tl.load(values + slot, mask=kept, other=0)
    return value


@triton.jit
def _product(
    x,
    values,
    mask,
    starts,
    bases,
    scale,
    y,
    n,
    R,
    C,
    OUTPUTS: tl.constexpr,
    ONE: tl.constexpr,
    SCALED: tl.constexpr,
    FOUR: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """y [n, R]; with ONE row of x by multiply and add, else by matrix instructions for 16 rows."""
    LANES: tl.constexpr = COLUMNS // PER_LANE
    row = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    there = row < R
    base = tl.load(bases + row, mask=there, other=0)[:, None]
    column = tl.arange(0, LANES) * PER_LANE
    at = ((row * ((C + 63) // 64 * 2))[:, None] + (column // 32)[None, :]).to(tl.uint32)
    bit = (tl.full([LANES], 1, tl.uint32) << (column % 32).to(tl.uint32))[None, :]
    of_x = tl.arange(0, MOST_ROWS)[None, :]
    total = tl.zeros([OUTPUTS, LANES if ONE else MOST_ROWS], tl.float32)
    word, start = _words(mask, starts, at, there[:, None] & (column < C)[None, :])
    for first in range(0, C, COLUMNS):
        slot = base + start + _bits_set(word & (bit - 1), NATIVE)
        now = word
        at += COLUMNS // 32  # the next words are fetched before these values are waited for
        inside = there[:, None] & (column + first + COLUMNS < C)[None, :]
        word, start = _words(mask, starts, at, inside)
        part = tl.zeros_like(total) if SCALED else total
        for j in tl.static_range(PER_LANE):
            kept = (now & (bit << j)) != 0
            weight = _value(values, slot, kept, FOUR)
            slot += kept.to(tl.uint32)
            place = first + column + j
            if ONE:
                inputs = tl.load(x + place, mask=place < C, other=0)
                part += weight.to(tl.float32) * inputs.to(tl.float32)[None, :]
            else:
                wanted = (place < C)[:, None] & (of_x < n)
                inputs = tl.load(x + of_x * C + place[:, None], mask=wanted, other=0)
                if NATIVE:
                    part = tl.dot(weight.to(inputs.dtype), inputs, part)
                else:  # the interpreter takes the bits of bf16 for whole numbers in a dot
                    part += tl.dot(weight.to(tl.float32), inputs.to(tl.float32), input_precision="ieee")
        if SCALED:
            factor = tl.load(scale + row * tl.cdiv(C, COLUMNS) + first // COLUMNS, mask=there, other=0)
            total += part * factor.to(tl.float32)[:, None]
        else:
            total = part
    if ONE:
        tl.store(y + row, tl.sum(total, axis=1).to(y.dtype.element_ty), mask=there)
    else:
        to = y + of_x * R + row[:, None]
        tl.store(to, total.to(y.dtype.element_ty), mask=there[:, None] & (of_x < n))


@triton.jit
def _dense(
    out,
    values,
    mask,
    starts,
    bases,
    scale,
    first_row,
    last_row,
    C,
    OUTPUTS: tl.constexpr,
    SCALED: tl.constexpr,
    FOUR: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """out [last row - first row, C]: the dense rows."""
    row = first_row + tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    there = row < last_row
    base = tl.load(bases + row, mask=there, other=0)[:, None]
    column = tl.arange(0, COLUMNS)
    at = ((row * ((C + 63) // 64 * 2))[:, None] + (column // 32)[None, :]).to(tl.uint32)
    bit = (tl.full([COLUMNS], 1, tl.uint32) << (column % 32).to(tl.uint32))[None, :]
    to = out + (row - first_row).to(tl.int64)[:, None] * C
    for first in range(0, C, COLUMNS):
        inside = there[:, None] & (first + column < C)[None, :]
        word, start = _words(mask, starts, at, inside)
        kept = (word & bit) != 0
        weight = _value(values, base + start + _bits_set(word & (bit - 1), NATIVE), kept, FOUR)
        if SCALED:
            factor = tl.load(scale + row * tl.cdiv(C, COLUMNS) + first // COLUMNS, mask=there, other=0)
            weight = weight.to(tl.float32) * factor.to(tl.float32)[:, None]
        tl.store(to + (first + column)[None, :], weight.to(out.dtype.element_ty), mask=inside)
        at += COLUMNS // 32


def product(x: Tensor, packed: Packed, beside: tuple[Tensor, Tensor], shape: tuple[int, int]) -> Tensor:
    """y [n, R] of x [n, C], bf16 or fp16, contiguous, n from 1 to `MOST`.

    Args:
        x: of the dtype of the values where these are of 16 bits.
        packed: checked. beside: what `gpu.prepared` gives.
        shape: outputs of a program and its warps; with more than one row of x, outputs from 16 on.
    """
    outputs, warps = shape
    rows = len(beside[0])
    y = torch.empty((len(x), rows), dtype=x.dtype, device=x.device)
    _product[(triton.cdiv(rows, outputs),)](
        x,
        *_parts(packed, beside),
        y,
        len(x),
        rows,
        packed.columns,
        OUTPUTS=outputs,
        ONE=len(x) == 1,
        SCALED=packed.scale is not None,
        FOUR=packed.bits == 4,
        NATIVE=not INTERPRETED,
        num_warps=warps,
    )
    return y


def expand_rows(beside: tuple[Tensor, Tensor], packed: Packed, first: int, out: Tensor) -> None:
    """Writes the rows from `first` on of a checked matrix to `out` [some rows, C], contiguous.

    `out` has the dtype of the values, or any of bf16, fp16 and fp32; `beside` is what `gpu.prepared` gives.
    """
    outputs, warps = _DENSE
    _dense[(triton.cdiv(len(out), outputs),)](
        out,
        *_parts(packed, beside),
        first,
        first + len(out),
        packed.columns,
        OUTPUTS=outputs,
        SCALED=packed.scale is not None,
        FOUR=packed.bits == 4,
        NATIVE=not INTERPRETED,
        num_warps=warps,
    )


def _parts(packed: Packed, beside: tuple[Tensor, Tensor]) -> tuple[Tensor | None, ...]:
    """Values, words of the mask, first slots of these and of the rows, and scale, for a kernel."""
    starts, bases = beside
    assert packed.mask is not None
    bases = bases.view(torch.uint32) if bases.dtype == torch.int32 else bases
    return packed.values, packed.mask.view(torch.uint32), starts.view(torch.uint16), bases, packed.scale
