"""Products with packed weights, as the torch operator `llmprune::packed_linear`. n rows of x, R outputs, C inputs.

Up to 16 rows of x go through the fused native kernel, which reads the packed bytes once for all of them. More
rows, and any where there is no native code, go through blocks of dense rows and torch's own product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmprune.kernels import library
from llmprune.kernels.packing import Packed, byte_rows, check_scale, counts, expand_rows, mask_width

FUSED = 16  # rows of x; above, dense blocks are faster
_BLOCK_BYTES = 4 << 20  # of a block of dense rows
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_DTYPES = {32: (torch.float32,), 16: _FLOATS, 8: (torch.int8,), 4: (torch.uint8,)}

_operators = torch.library.Library("llmprune", "DEF")
_operators.define(
    "packed_linear(Tensor x, Tensor values, Tensor mask, Tensor rows, Tensor? scale, int columns, int bits,"
    " bool exact=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def check(
    values: Tensor,
    mask: Tensor,
    rows: Tensor,
    scale: Tensor | None,
    shape: tuple[int, int],
    bits: int,
) -> None:
    """Refuses a packed matrix whose parts do not fit one another, in one line. Reads every bit of the mask.

    `rows` are sums of values, also for int4, as a file has them.
    """
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"a packed matrix has rows and columns, not the shape {list(shape)}")
    _check_parts(values, mask, rows, bits)
    if len(mask) != shape[0]:
        raise ValueError(f"the mask has {len(mask)} rows, the matrix {shape[0]}")
    if (scale is None) != (bits > 8):
        raise ValueError(f"values of {bits} bits have {'a' if bits <= 8 else 'no'} scale")
    if scale is not None:
        check_scale(scale, shape)
    each, taken = counts(mask, shape[1])
    kept = each.cumsum(0)
    if int(rows[0]) != 0 or not torch.equal(rows[1:].long(), kept):
        raise ValueError("the row starts do not fit the mask: they must be the sums of its bits, from 0 on")
    wanted = int(taken.sum() if bits == 4 else kept[-1])
    if len(values) != wanted:
        raise ValueError(
            f"the mask keeps {int(kept[-1])} values, which are {wanted} entries of {values.dtype}, not {len(values)}"
        )


def checked(
    values: Tensor,
    mask: Tensor,
    rows: Tensor,
    scale: Tensor | None,
    shape: tuple[int, int],
    bits: int,
) -> Packed:
    """A packed matrix for `packed_linear`, checked. `rows` as in a file: for int4 they become starts in bytes."""
    check(values, mask, rows, scale, shape, bits)
    starts = byte_rows(mask, shape[1]) if bits == 4 else rows
    return Packed(values, mask, starts, scale, shape[1], bits)


def packed_linear(x: Tensor, *packed: Any, exact: bool = False) -> Tensor:
    """y [..., R] = x [..., C] times the transpose of a packed matrix, in the dtype of x.

    Args:
        x: bfloat16, float16 or float32.
        packed: the fields of a `Packed` that `checked` has made: values, mask, rows, scale, columns, bits.
        exact: never round x. Otherwise, with int8 and int4 values, up to 16 rows and AVX-512, x is rounded to
            signed bytes with a scale per 128 columns.
    """
    result: Tensor = torch.ops.llmprune.packed_linear(x, *packed, exact)
    return result


def _check_parts(values: Tensor, mask: Tensor, rows: Tensor, bits: int) -> None:
    if bits not in _DTYPES or values.dtype not in _DTYPES[bits]:
        raise ValueError(f"values of {bits} bits cannot be {values.dtype}; bits are 32, 16, 8 or 4")
    for name, part, dimensions in (("values", values, 1), ("mask", mask, 2), ("rows", rows, 1)):
        if part.ndim != dimensions or not part.is_contiguous() or part.device.type != "cpu":
            raise ValueError(
                f"{name} must be contiguous, of {dimensions} dimension{'s' * (dimensions > 1)} and on the CPU,"
                f" not {list(part.shape)} on {part.device}"
            )
    if mask.dtype != torch.uint8 or rows.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"the mask must be uint8 and the rows int32 or int64, not {mask.dtype} and {rows.dtype}"
        )
    if len(rows) != len(mask) + 1:
        raise ValueError(f"{len(mask)} rows of mask want {len(mask) + 1} row starts, not {len(rows)}")


def _check_call(x: Tensor, packed: Packed) -> None:
    """What costs nothing to look at; all else was seen by `check`, and the native code follows no bad start."""
    _check_parts(*packed[:3], packed.bits)
    if x.dtype not in _FLOATS or x.ndim < 1 or x.shape[-1] != packed.columns:
        raise ValueError(
            f"x must be bfloat16, float16 or float32 [..., {packed.columns}], not {x.dtype} {list(x.shape)}"
        )
    if packed.mask.shape[1] != mask_width(packed.columns):
        raise ValueError(f"{list(packed.mask.shape)} is no mask of {packed.columns} columns")
    scale = packed.scale
    if (scale is None) != (packed.bits > 8):
        raise ValueError(f"values of {packed.bits} bits have {'a' if packed.bits <= 8 else 'no'} scale")
    if scale is not None and (
        scale.dtype != torch.bfloat16
        or scale.shape != (len(packed.mask), -(-packed.columns // 128))
        or not scale.is_contiguous()
    ):
        raise ValueError(f"{scale.dtype} {list(scale.shape)} is no scale of {packed.columns} columns")


@torch.library.impl(_operators, "packed_linear", "CPU")
def _packed_linear(x: Tensor, *rest: Any) -> Tensor:
    *fields, exact = rest if len(rest) == 7 else (*rest, False)
    packed = Packed(*fields)
    _check_call(x, packed)
    flat = x.reshape(-1, packed.columns).contiguous()
    if 0 < len(flat) <= FUSED and library.available():
        y = fused(flat, packed, exact).to(x.dtype)
    else:
        y = by_blocks(flat, packed)
    return y.view(*x.shape[:-1], len(packed.mask))


@torch.library.register_fake("llmprune::packed_linear", lib=_operators)
def _shape(x: Tensor, values: Tensor, mask: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], mask.shape[0]))


def fused(x: Tensor, packed: Packed, exact: bool = False, path: int = 0) -> Tensor:
    """y float32 [n, R] of x [n, C] by the native kernel; `path` of `library.PATHS`, 0 for the fastest."""
    native, state = library.native(), library.loaded()
    matrix = library.matrix_of(packed[:4], packed.columns)
    scratch = torch.empty(native.llmprune_scratch_bytes(matrix, len(x)), dtype=torch.uint8)
    y = torch.empty((len(x), len(packed.mask)), dtype=torch.float32)
    code = native.llmprune_product(
        matrix,
        x.data_ptr(),
        library.KINDS[x.dtype],
        len(x),
        exact,
        path or state.path,
        torch.get_num_threads(),
        scratch.data_ptr(),
        y.data_ptr(),
    )
    library.demand(code)
    return y


def by_blocks(x: Tensor, packed: Packed) -> Tensor:
    """y [n, R] of x [n, C] through blocks of dense rows in the dtype of x, or in float32 where values are."""
    same = packed.scale is not None or packed.values.dtype == x.dtype
    dtype = x.dtype if same else torch.float32
    rows, columns = len(packed.mask), packed.columns
    most = max(16, _BLOCK_BYTES // (columns * dtype.itemsize))
    wide = (
        dtype == torch.float16 and packed.scale is not None
    )  # the native code scales to float32 or bfloat16
    block = torch.empty((min(most, rows), columns), dtype=torch.float32 if wide else dtype)
    y = torch.empty((rows, len(x)), dtype=dtype)
    across = x.to(dtype).t()
    for first in range(0, rows, most):
        part = block[: min(most, rows - first)]
        expand_rows(packed, first, part)
        torch.mm(part.to(dtype), across, out=y[first : first + len(part)])
    return y.t().to(x.dtype).contiguous()
