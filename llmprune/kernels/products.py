"""Products with packed weights: the operator `llmprune::packed_linear`. n rows of x, R outputs, C inputs.

Few rows of x, 16 or 32, go through the fused native kernel, which reads the packed bytes once for 16 of them.
More rows, and any where there is no native code, go through blocks of dense rows and torch's own product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmprune.kernels import gpu, library
from llmprune.kernels.layout import FLOATS, Packed, check, check_parts, checked, mask_width
from llmprune.kernels.packing import expand_rows

__all__ = ["Packed", "by_blocks", "check", "checked", "fused", "packed_linear"]

_AT_ONCE = 16  # rows of x that the fused kernel takes
_BLOCK_BYTES = 8 << 20  # of a block of dense rows
_GPU_BLOCK_BYTES = 128 << 20

_operators = torch.library.Library("llmprune", "FRAGMENT")
_operators.define(
    "packed_linear(Tensor x, Tensor values, Tensor mask, Tensor rows, Tensor? scale, int columns, int bits,"
    " bool exact=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def packed_linear(x: Tensor, *packed: Any, exact: bool = False) -> Tensor:
    """y [..., R] = x [..., C] times the transpose of a packed matrix, in the dtype of x.

    Args:
        x: bfloat16, float16 or float32.
        packed: the fields of a `Packed` that `checked` has made: values, mask, rows, scale, columns, bits.
        exact: never round x. Otherwise, with int8 and int4 values, up to 32 rows and AVX-512, x is rounded to
            signed bytes with a scale per 128 columns.
    """
    result: Tensor = torch.ops.llmprune.packed_linear(x, *packed, exact)
    return result


def _check_call(x: Tensor, packed: Packed) -> None:
    """What costs nothing to look at: `check` saw the rest, and the native code follows no bad start."""
    check_parts(*packed[:3], packed.bits)
    if x.dtype not in FLOATS or x.ndim < 1 or x.shape[-1] != packed.columns:
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
    if library.available() and 0 < len(flat) <= most_fused(flat, packed, exact):
        parts = flat.tensor_split(-(-len(flat) // _AT_ONCE))
        y = torch.cat([fused(part, packed, exact) for part in parts]).to(x.dtype)
    else:
        y = by_blocks(flat, packed)
    return y.view(*x.shape[:-1], len(packed.mask))


@torch.library.impl(_operators, "packed_linear", "CUDA")
def _packed_linear_on_gpu(x: Tensor, *rest: Any) -> Tensor:
    packed = Packed(*rest[:6])
    _check_call(x, packed)
    if x.device != packed.values.device:
        raise ValueError(f"x is on {x.device}, the packed matrix on {packed.values.device}")
    y = by_blocks(x.reshape(-1, packed.columns), packed, gpu.expand_rows)
    return y.view(*x.shape[:-1], len(packed.mask))


def _shape(x: Tensor, values: Tensor, mask: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], mask.shape[0]))


torch.library.register_fake("llmprune::packed_linear", _shape, lib=_operators)


def most_fused(x: Tensor, packed: Packed, exact: bool) -> int:
    """How many rows of x the fused kernel is faster for than blocks of dense rows."""
    path = library.loaded().path
    bytes_of_x = packed.scale is not None and not exact and path >= library.PATHS["avx512"]
    both = x.dtype == packed.values.dtype == torch.bfloat16 and path == library.PATHS["avx512-bf16"]
    return 2 * _AT_ONCE if bytes_of_x or both else _AT_ONCE


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


def by_blocks(
    x: Tensor, packed: Packed, expand: Callable[[Packed, int, Tensor], None] = expand_rows
) -> Tensor:
    """y [n, R] of x [n, C] through blocks of dense rows in the dtype of x, or in float32 where values are.

    `expand` writes some rows from one on.
    """
    same = packed.scale is not None or packed.values.dtype == x.dtype
    dtype = x.dtype if same else torch.float32
    rows, columns = len(packed.mask), packed.columns
    room = _BLOCK_BYTES if x.is_cpu else _GPU_BLOCK_BYTES
    most = max(64, room // (columns * dtype.itemsize) // 64 * 64)
    # The native code scales to float32 or bfloat16.
    wide = dtype == torch.float16 and packed.scale is not None
    block = torch.empty((min(most, rows), columns), dtype=torch.float32 if wide else dtype, device=x.device)
    y = torch.empty((len(x), rows), dtype=x.dtype, device=x.device)
    x = x.to(dtype)
    for first in range(0, rows, most):
        part = block[: min(most, rows - first)]
        expand(packed, first, part)
        y[:, first : first + len(part)] = x @ part.to(dtype).t()
    return y
