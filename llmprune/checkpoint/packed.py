"""Packed tensors: of a pruned matrix the kept values and a bit per weight are stored, nothing else.

A tensor X becomes X, now 1-D with the kept values of its rows one after the other, `X_mask` with a bit per
weight, `X_rows` with the number of values before each row and, where values are quantised, `X_scale`. What is
kept is said by the bits, so zeros among the kept values survive. R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmprune.checkpoint.files import NAMES
from llmprune.checkpoint.reader import Checkpoint, TensorInfo
from llmprune.common.messages import shown
from llmprune.kernels import layout as bits_and_rows
from llmprune.kernels import packing
from llmprune.kernels.layout import GROUP, WORD, bits_of, keep_of
from llmprune.numerics import grids

METHOD = "llmprune"  # quant_method in config.json: other loaders refuse it
VERSION = 1
VALUES = {"same": 16, "int8": 8, "int4": 4}  # bits of a value; 16 stands for values as they are
BITS = tuple(VALUES.values())
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
    """

    rows: int
    columns: int
    dtype: torch.dtype
    stacked: int = 0
    transposed: bool = False
    bits: int = 16

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
        starts = (8 if kept >= 1 << 31 else 4) * (self.rows + 1)
        return values + 8 * self.rows * self.words + starts + scales


def pack(dense: Tensor, mask: Tensor, layout: Layout) -> dict[str, Tensor]:
    """The parts of a packed tensor, by what is added to its name; its values are rounded where bits are few.

    Args:
        dense: the tensor.
        mask: its bits, uint8 [R, 8 ceil(C / 64)]; bit j % 8, the least significant first, of byte j // 8 is
            column j, and 1 means kept.
        layout: of the tensor.
    """
    matrix, rows = layout.matrix(dense).contiguous(), bits_and_rows.row_sums(mask, layout.columns)
    if layout.bits == 16:
        return {"": packing.compress(matrix, mask), "_mask": mask, "_rows": rows}
    matrix = matrix.float().masked_fill(~keep_of(mask, layout.columns), 0.0)
    scales = grids.scales_of(matrix, layout.bits, GROUP)
    values = packing.compress(grids.codes_of(matrix, scales, layout.bits, GROUP), mask)
    values = packing.pack_nibbles(values, mask, layout.columns) if layout.bits == 4 else values
    return {"": values, "_mask": mask, "_rows": rows, "_scale": scales}


def widened(bits: Tensor, columns: int) -> Tensor:
    """The bits of `masks.safetensors`, uint8 [R, ceil(C / 8)], with rows of whole words."""
    room = 8 * -(-columns // WORD) - bits.shape[1]
    return torch.nn.functional.pad(bits, (0, room)).contiguous() if room else bits.contiguous()


def unpack(parts: Mapping[str, Tensor], layout: Layout, name: str) -> Tensor:
    """The dense tensor of packed parts.

    Raises:
        ValueError: parts that do not fit together; the message names the tensor.
    """
    check(parts, layout, name)
    values, mask = parts[""], parts["_mask"]
    shape = (layout.rows, layout.columns)
    return layout.dense(packing.expand(values, mask, shape, layout.dtype, parts.get("_scale")))


def check(parts: Mapping[str, Tensor], layout: Layout, name: str) -> None:
    """Raise `ValueError` unless the parts of a packed tensor fit together in every bit."""
    try:
        bits_and_rows.check(
            parts[""],
            parts["_mask"],
            parts["_rows"],
            parts.get("_scale"),
            (layout.rows, layout.columns),
            layout.bits,
        )
    except ValueError as error:
        raise ValueError(f"the packed tensor {shown(name)} is damaged: {error}") from None


class Packing:
    """Packs the tensors that a run writes.

    Args:
        layouts: of the tensors that may be packed, by name.
        bits: of a value.

    Raises:
        ValueError: values of several dtypes are to be rounded, which the format cannot tell apart.
    """

    def __init__(self, layouts: Mapping[str, Layout], bits: int = 16) -> None:
        dtypes = sorted({str(layout.dtype).removeprefix("torch.") for layout in layouts.values()})
        if bits != 16 and len(dtypes) > 1:
            raise ValueError(
                f"the matrices are of several dtypes ({', '.join(dtypes)}), and rounded values become one; "
                "use --values same"
            )
        self.layouts = {name: replace(layout, bits=bits) for name, layout in layouts.items()}
        self._bits = bits

    def parts(self, tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is stored of some tensors: those that become smaller are packed, the others stay as they are.

        Args:
            tensors: dense, by name.
            masks: the bits of their matrices as `masks.safetensors` has them; of a stack by `NAME.NUMBER`.
        """
        stored: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            layout = self.layouts.get(name)
            mask = _mask_of(name, layout, masks) if layout is not None else None
            if layout is None or mask is None:
                stored[name] = tensor
                continue
            if layout.bytes(mask) < tensor.nbytes:
                stored |= {name + part: t for part, t in pack(tensor, mask, layout).items()}
            else:
                stored[name] = tensor
        return stored

    def entry(self, headers: Mapping[str, TensorInfo | Any], load: Callable[[str], Tensor]) -> dict[str, Any]:
        """What config.json says of what was written; see `entry_of`.

        Args:
            headers: every tensor that was written, by name. load: reads one.
        """
        packed = {name: layout for name, layout in self.layouts.items() if f"{name}_mask" in headers}
        kept = {name: int(load(f"{name}_rows")[-1]) for name in packed}
        return entry_of(packed, kept, self._bits)


def _mask_of(name: str, layout: Layout, masks: Mapping[str, Tensor]) -> Tensor | None:
    """The mask of a tensor, uint8 [R, 8 ceil(C / 64)]; None where none of its matrices is pruned."""
    if not layout.stacked:
        return widened(masks[name], layout.columns) if name in masks else None
    parts = [masks.get(f"{name}.{number}") for number in range(layout.stacked)]
    if all(part is None for part in parts):
        return None
    whole = bits_of(torch.ones(layout.rows // layout.stacked, layout.columns, dtype=torch.bool))
    return torch.cat([whole if part is None else widened(part, layout.columns) for part in parts])


def entry_of(layouts: Mapping[str, Layout], kept: Mapping[str, int], bits: int) -> dict[str, Any]:
    """What config.json says of a packed folder, by tensor: its rows, columns and kept values."""
    transposed = sorted(name for name, layout in layouts.items() if layout.transposed)
    stacks = {name: layout.stacked for name, layout in layouts.items() if layout.stacked}
    dtypes = {str(layout.dtype).removeprefix("torch.") for layout in layouts.values()}
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "bits": bits,
        "group": GROUP,
        "matrices": {n: [layout.rows, layout.columns, kept[n]] for n, layout in sorted(layouts.items())},
        **({"transposed": transposed} if transposed else {}),
        **({"stacks": dict(sorted(stacks.items()))} if stacks else {}),
        **({"dtype": min(dtypes)} if bits != 16 and layouts else {}),
    }


class Packed:
    """A weight source that has the tensors of a packed checkpoint as dense ones.

    Args:
        source: the checkpoint as it lies in its files.
        entry: what its config.json says of it, see `entry_of`.

    Raises:
        ValueError: the entry is of another version or damaged, or does not fit the files.
    """

    def __init__(self, source: Checkpoint, entry: Mapping[str, Any]) -> None:
        self.source = source
        self.layouts = layouts_of(entry, source.tensors)
        parts = {name + part for name in self.layouts for part in PARTS[1:]}
        self.tensors = {n: tensor for n, tensor in source.tensors.items() if n not in parts}
        for name, layout in self.layouts.items():
            size = math.prod(layout.shape) * layout.dtype.itemsize
            self.tensors[name] = TensorInfo(layout.shape, layout.dtype, size, NAMES[layout.dtype])

    @property
    def values(self) -> str:
        """How its values are packed, see `VALUES`."""
        bits = {layout.bits for layout in self.layouts.values()} or {16}
        return next(name for name, number in VALUES.items() if number in bits)

    def load_mask(self, name: str) -> Tensor:
        """The mask of a packed tensor, uint8 [R, 8 ceil(C / 64)]."""
        return self.source.load(f"{name}_mask")

    def load(self, name: str) -> Tensor:
        """One tensor on the CPU, dense."""
        if name not in self.layouts:
            return self.source.load(name)
        return unpack(read_parts(self.source.load, name, self.layouts[name].bits), self.layouts[name], name)

    @property
    def files(self) -> frozenset[str]:
        """The names of the weight files."""
        return self.source.files

    def check(self) -> None:
        """Raise `ValueError` if a weight file has changed."""
        self.source.check()


def read_parts(load: Callable[[str], Tensor], name: str, bits: int) -> dict[str, Tensor]:
    """The parts of a packed tensor, each read by its name."""
    return {part: load(name + part) for part in (PARTS[:3] if bits == 16 else PARTS)}


def layouts_of(entry: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, Layout]:
    """The packed tensors of a checkpoint with this entry in its config, each checked against the headers."""
    if entry.get("version") != VERSION:
        raise ValueError(
            f"the packed checkpoint is of version {shown(entry.get('version'))}, and this llmprune reads "
            f"version {VERSION}; update llmprune"
        )
    try:
        bits, group, matrices = entry["bits"], entry["group"], dict(entry["matrices"])
        transposed, stacks = frozenset(entry.get("transposed", ())), dict(entry.get("stacks", {}))
        whole = [*matrices.values(), *((count,) for count in stacks.values())]
        numbers = [number for sizes in whole for number in sizes]
        if bits not in BITS or group != GROUP or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError("sizes")
        dense = getattr(torch, entry["dtype"]) if bits != 16 else None
        if dense is not None and not (isinstance(dense, torch.dtype) and dense.is_floating_point):
            raise ValueError("dtype")
        sizes = {str(name): (int(r), int(c), int(n)) for name, (r, c, n) in matrices.items()}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"quantization_config of the packed checkpoint is damaged ({shown(error)}); restore config.json"
        ) from None
    found = {}
    for name, (rows, columns, kept) in sizes.items():
        values = tensors.get(name)
        layout = Layout(
            rows,
            columns,
            dense or (values.dtype if values is not None and values.dtype else torch.bfloat16),
            int(stacks.get(name, 0)),
            name in transposed,
            bits,
        )
        _check_header(name, layout, kept, tensors)
        found[name] = layout
    return found


def _check_header(name: str, layout: Layout, kept: int, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise `ValueError` where the headers have other shapes than the config says."""
    rows, groups = layout.rows, -(-layout.columns // GROUP)
    wanted: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
        "": ((kept,), {16: ("F32", "F16", "BF16"), 8: ("I8",), 4: ("U8",)}[layout.bits]),
        "_mask": ((rows, 8 * layout.words), ("U8",)),
        "_rows": ((rows + 1,), ("I32", "I64")),
    }
    if layout.bits != 16:
        wanted["_scale"] = ((rows, groups), ("BF16",))
    if rows < 1 or layout.columns < 1 or (layout.stacked and rows % layout.stacked):
        raise ValueError(
            f"the packed tensor {shown(name)} has {rows} rows of {layout.columns}; it is damaged"
        )
    for part, (shape, stored) in wanted.items():
        tensor = tensors.get(name + part)
        # Values of 4 bits begin anew with every mask word: how many bytes they take follows from the mask.
        some = part == "" and layout.bits == 4
        if tensor is not None and tensor.stored in stored and (some or tensor.shape == shape):
            continue
        have = "nothing" if tensor is None else f"{tensor.stored} {list(tensor.shape)}"
        raise ValueError(
            f"config.json asks for {stored[0]} {list(shape)} in {shown(name + part)}, and the files hold "
            f"{have}; the packed checkpoint is damaged"
        )
