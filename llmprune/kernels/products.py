"""Products with packed weights: the operators `llmprune::packed_linear` and, of several matrices with one x,
`llmprune::packed_linears`. n rows of x, R outputs, C inputs.

Few rows of x, 16 or 32, go through the fused native kernel, which reads the packed bytes once for 16 of them.
More rows, and any where there is no native code, go through blocks of dense rows and torch's own product.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmprune.kernels import gpu, library
from llmprune.kernels.layout import FLOATS, Packed, check, check_parts, checked, mask_width
from llmprune.kernels.packing import expand_rows

__all__ = ["Packed", "alike", "by_blocks", "check", "checked", "fused", "packed_linear", "packed_linears"]

MOST_MATRICES = 8  # that the native code multiplies with one x at once
_AT_ONCE = 16  # rows of x that the fused kernel takes
_BLOCK_BYTES = 8 << 20  # of a block of dense rows
_GPU_BLOCK_BYTES = 128 << 20

_operators = torch.library.Library("llmprune", "FRAGMENT")
_operators.define(
    "packed_linear(Tensor x, Tensor values, Tensor? mask, Tensor? rows, Tensor? scale, int columns, int bits,"
    " bool exact=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_operators.define(
    "packed_linears(Tensor x, Tensor[] values, Tensor?[] masks, Tensor?[] rows, Tensor?[] scales,"
    " int columns, int bits, bool exact=False) -> Tensor[]",
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


def packed_linears(x: Tensor, matrices: Sequence[Packed], exact: bool = False) -> list[Tensor]:
    """As `packed_linear`, of up to 8 matrices that are `alike`: y [..., R] of each, made in one go."""
    values, masks, rows, scales = ([packed[part] for packed in matrices] for part in range(4))
    first = matrices[0]
    result: list[Tensor] = torch.ops.llmprune.packed_linears(
        x, values, masks, rows, scales, first.columns, first.bits, exact
    )
    return result


def alike(one: Packed, other: Packed) -> bool:
    """Whether two matrices differ in their rows and values alone."""
    same = one.columns == other.columns and one.bits == other.bits
    return same and one.values.dtype == other.values.dtype and (one.mask is None) == (other.mask is None)


def _check_call(x: Tensor, packed: Packed) -> None:
    """What costs nothing to look at: `check` saw the rest, and the native code follows no bad start."""
    check_parts(*packed[:3], packed.bits)
    if x.dtype not in FLOATS or x.ndim < 1 or x.shape[-1] != packed.columns:
        raise ValueError(
            f"x must be bfloat16, float16 or float32 [..., {packed.columns}], not {x.dtype} {list(x.shape)}"
        )
    if packed.mask is not None and packed.mask.shape[1] != mask_width(packed.columns):
        raise ValueError(f"{list(packed.mask.shape)} is no mask of {packed.columns} columns")
    scale = packed.scale
    if (scale is None) != (packed.bits > 8):
        raise ValueError(f"values of {packed.bits} bits have {'a' if packed.bits <= 8 else 'no'} scale")
    if scale is not None and (
        scale.dtype != torch.bfloat16
        or scale.ndim != 2
        or scale.shape != (packed.height, -(-packed.columns // 128))
        or not scale.is_contiguous()
    ):
        raise ValueError(f"{scale.dtype} {list(scale.shape)} is no scale of {packed.columns} columns")


@torch.library.impl(_operators, "packed_linear", "CPU")
def _packed_linear(x: Tensor, *rest: Any) -> Tensor:
    return _products(x, [Packed(*rest[:6])], len(rest) == 7 and rest[6])[0]


@torch.library.impl(_operators, "packed_linears", "CPU")
def _packed_linears(x: Tensor, *rest: Any) -> list[Tensor]:
    return _products(x, _matrices(*rest[:6]), len(rest) == 7 and rest[6])


def _matrices(values: Any, masks: Any, rows: Any, scales: Any, columns: int, bits: int) -> list[Packed]:
    each = zip(values, masks, rows, scales, strict=True)
    return [Packed(*parts, columns, bits) for parts in each]


def _products(x: Tensor, matrices: list[Packed], exact: bool) -> list[Tensor]:
    for packed in matrices:
        _check_call(x, packed)
    if not 0 < len(matrices) <= MOST_MATRICES or not all(alike(matrices[0], m) for m in matrices[1:]):
        raise ValueError(f"one to {MOST_MATRICES} matrices of one kind share a product, not {len(matrices)}")
    flat = x.reshape(-1, matrices[0].columns).contiguous()
    if library.available() and 0 < len(flat) <= most_fused(flat.dtype, matrices[0], exact):
        ys = _Native(matrices, exact)(flat, x.dtype)
    else:
        ys = [by_blocks(flat, packed) for packed in matrices]
    return [y.view(*x.shape[:-1], packed.height) for y, packed in zip(ys, matrices, strict=True)]


@torch.library.impl(_operators, "packed_linear", "CUDA")
def _packed_linear_on_gpu(x: Tensor, *rest: Any) -> Tensor:
    packed = Packed(*rest[:6])
    _check_call(x, packed)
    if x.device != packed.values.device:
        raise ValueError(f"x is on {x.device}, the packed matrix on {packed.values.device}")
    y = by_blocks(x.reshape(-1, packed.columns), packed, gpu.expand_rows)
    return y.view(*x.shape[:-1], packed.height)


@torch.library.impl(_operators, "packed_linears", "CUDA")
def _packed_linears_on_gpu(x: Tensor, *rest: Any) -> list[Tensor]:
    return [_packed_linear_on_gpu(x, *packed) for packed in _matrices(*rest[:6])]


def _shape(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], Packed(*rest[:6]).height))


def _shapes(x: Tensor, *rest: Any) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], packed.height)) for packed in _matrices(*rest[:6])]


torch.library.register_fake("llmprune::packed_linear", _shape, lib=_operators)
torch.library.register_fake("llmprune::packed_linears", _shapes, lib=_operators)


def most_fused(dtype: torch.dtype, packed: Packed, exact: bool) -> int:
    """How many rows of x the fused kernel is faster for than blocks of dense rows."""
    path = library.loaded().path
    bytes_of_x = packed.scale is not None and not exact and path >= library.PATHS["avx512"]
    both = dtype == packed.values.dtype == torch.bfloat16 and path == library.PATHS["avx512-bf16"]
    return 2 * _AT_ONCE if bytes_of_x or both else _AT_ONCE


def fused(x: Tensor, packed: Packed, exact: bool = False, path: int = 0) -> Tensor:
    """y float32 [n, R] of x [n, C] by the native kernel; `path` of `library.PATHS`, 0 for the fastest."""
    return _Native([packed], exact, path)(x.contiguous(), torch.float32)[0]


class _Native:
    """The native product of checked matrices that are `alike`; parts must stay where they are in memory."""

    def __init__(self, matrices: Sequence[Packed], exact: bool, path: int = 0) -> None:
        self._count, self._exact, self._columns = len(matrices), exact, matrices[0].columns
        self._heights = [packed.height for packed in matrices]
        self._matrices = (library.Matrix * len(matrices))(
            *(library.matrix_of(m[:4], m.columns) for m in matrices)
        )
        self._path, self._library = path or library.loaded().path, library.native()
        self._addresses = ctypes.c_void_p * len(matrices)
        self._room = self._library.llmprune_scratch_bytes(self._matrices, self._count, _AT_ONCE)

    def __call__(self, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """y [..., R] of contiguous x [..., C]."""
        made = dtype if dtype == torch.bfloat16 else torch.float32
        ys = [torch.empty((*x.shape[:-1], height), dtype=made) for height in self._heights]
        scratch, threads = torch.empty(self._room, dtype=torch.uint8), torch.get_num_threads()
        rows, address, width = x.numel() // self._columns, x.data_ptr(), x.element_size() * self._columns
        at, room, size = [y.data_ptr() for y in ys], scratch.data_ptr(), made.itemsize
        for first in range(0, rows, _AT_ONCE):
            code = self._library.llmprune_products(
                self._matrices,
                self._count,
                address + first * width,
                library.KINDS[x.dtype],
                min(_AT_ONCE, rows - first),
                self._exact,
                self._path,
                threads,
                room,
                self._addresses(*(y + first * h * size for y, h in zip(at, self._heights, strict=True))),
                library.KINDS[made],
            )
            if code:
                library.demand(code)
        return ys if made == dtype else [y.to(dtype) for y in ys]


class Prepared:
    """Matrices that are `alike`, ready for few rows of x: without checks, and torch does not see the call.

    Args:
        matrices: checked; their parts must stay where they are in memory.
    """

    def __init__(self, matrices: Sequence[Packed]) -> None:
        assert 0 < len(matrices) <= MOST_MATRICES and all(alike(matrices[0], m) for m in matrices)
        self.matrices, self._columns = list(matrices), matrices[0].columns
        self._most = dict.fromkeys(FLOATS, 0)
        if library.available():
            self._native = _Native(self.matrices, False)
            self._most = {dtype: most_fused(dtype, matrices[0], False) for dtype in FLOATS}

    def takes(self, x: Tensor) -> bool:
        """Whether x is an ordinary tensor with few rows, and nobody watches what is computed with it."""
        if type(x) is not Tensor or not x.is_cpu or not x.shape or x.shape[-1] != self._columns:
            return False
        if not 0 < x.numel() <= self._most.get(x.dtype, 0) * self._columns:
            return False
        if x.requires_grad and torch.is_grad_enabled():
            return False
        watched = torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None
        return not watched and torch._C._functorch.maybe_current_level() is None

    def __call__(self, x: Tensor) -> list[Tensor]:
        """y [..., R] of each matrix, of an x that `takes`."""
        return self._native(x.contiguous(), x.dtype)


def by_blocks(
    x: Tensor, packed: Packed, expand: Callable[[Packed, int, Tensor], None] = expand_rows
) -> Tensor:
    """y [n, R] of x [n, C] through blocks of dense rows in the dtype of x, or in float32 where values are.

    With AMX bf16 products are our own, of rows that stay in the cache; all others are torch's. `expand`
    writes some rows from one on.
    """
    small = packed.scale is not None or packed.values.dtype == torch.bfloat16
    tiles = expand is expand_rows and small and x.dtype == torch.bfloat16 and library.available()
    if tiles and library.native().llmprune_tiles():
        return _by_tiles(x, packed)
    same = packed.scale is not None or packed.values.dtype == x.dtype
    dtype = x.dtype if same else torch.float32
    rows, columns = packed.height, packed.columns
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


def _by_tiles(x: Tensor, packed: Packed) -> Tensor:
    """y bf16 [n, R] of contiguous x bf16 [n, C] by the native code for AMX."""
    native, threads = library.native(), torch.get_num_threads()
    matrix = library.matrix_of(packed[:4], packed.columns)
    scratch = torch.empty(native.llmprune_many_bytes(matrix, len(x), threads), dtype=torch.uint8)
    y = torch.empty((len(x), packed.height), dtype=torch.bfloat16)
    if y.numel():
        address = scratch.data_ptr()
        library.demand(native.llmprune_many(matrix, x.data_ptr(), len(x), threads, address, y.data_ptr()))
    return y
