"""Packed tensors: of a pruned matrix the kept values and a bit per weight are stored, nothing else.

A tensor X becomes X, now 1-D with the kept values of its rows one after the other, `X_mask` with a bit per
weight, `X_rows` with the number of values before each row and, where values are quantised, `X_scale`. What is
kept is said by the bits, so zeros among the kept values survive. Of a tensor whose weights are all kept, and
rounded to 8 or 4 bits, there are only X and `X_scale`. R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from llmprune.checkpoint.files import NAMES
from llmprune.checkpoint.reader import Checkpoint, TensorInfo
from llmprune.common.messages import shown
from llmprune.contracts import VALUES
from llmprune.kernels import layout as bits_and_rows
from llmprune.kernels import packing
from llmprune.kernels.layout import GROUP, WORD, keep_of
from llmprune.numerics import grids

METHOD = "llmprune"  # quant_method in config.json: other loaders refuse it
VERSION = 1
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
        whole: every weight is kept, and there is no mask; of rounded values only.
    """

    rows: int
    columns: int
    dtype: torch.dtype
    stacked: int = 0
    transposed: bool = False
    bits: int = 16
    whole: bool = False

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

    @property
    def parts(self) -> tuple[str, ...]:
        """What is added to the name of the tensor for each of its parts."""
        masked = () if self.whole else ("_mask", "_rows")
        return ("", *masked, *(("_scale",) if self.bits != 16 else ()))

    def found(self, name: str, names: Container[str]) -> Layout | None:
        """The layout by which a tensor is packed among tensors of these names; None where it is dense."""
        if f"{name}_mask" in names:
            return replace(self, whole=False)
        return replace(self, whole=True) if self.bits != 16 and f"{name}_scale" in names else None

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
        if self.bits != 16 and kept == self.rows * self.columns:
            return values + scales
        starts = (8 if kept >= 1 << 31 else 4) * (self.rows + 1)
        return values + 8 * self.rows * self.words + starts + scales


def pack(dense: Tensor, mask: Tensor, layout: Layout, scales: Tensor | None = None) -> dict[str, Tensor]:
    """The parts of a packed tensor, by what is added to its name; its values are rounded where bits are few.

    Args:
        dense: the tensor.
        mask: its bits, uint8 [R, 8 ceil(C / 64)]; bit j % 8, the least significant first, of byte j // 8 is
            column j, and 1 means kept.
        layout: of the tensor.
        scales: those its values were rounded with, bfloat16 [R, ceil(C / 128)]; None to choose some.
    """
    matrix, rows = layout.matrix(dense).contiguous(), bits_and_rows.row_sums(mask, layout.columns)
    if layout.bits == 16:
        return {"": packing.compress(matrix, mask), "_mask": mask, "_rows": rows}
    matrix = matrix.float().masked_fill(~keep_of(mask, layout.columns), 0.0)
    scales = grids.scales_of(matrix, layout.bits, GROUP) if scales is None else scales
    values = packing.compress(grids.codes_of(matrix, scales, layout.bits, GROUP), mask)
    values = packing.pack_nibbles(values, mask, layout.columns) if layout.bits == 4 else values
    if int(rows[-1]) == matrix.numel():
        return {"": values, "_scale": scales}
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
    values, mask = parts[""], parts.get("_mask")
    shape = (layout.rows, layout.columns)
    return layout.dense(packing.expand(values, mask, shape, layout.dtype, parts.get("_scale")))


def check(parts: Mapping[str, Tensor], layout: Layout, name: str) -> None:
    """Raise `ValueError` unless the parts of a packed tensor fit together in every bit."""
    try:
        bits_and_rows.check(
            parts[""],
            parts.get("_mask"),
            parts.get("_rows"),
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
        ValueError: there are no packed values of so many bits; or values of several dtypes are to be rounded,
            which the format cannot tell apart.
    """

    def __init__(self, layouts: Mapping[str, Layout], bits: int = 16) -> None:
        dtypes = sorted({str(layout.dtype).removeprefix("torch.") for layout in layouts.values()})
        if bits != 16 and len(dtypes) > 1:
            raise ValueError(
                f"the matrices are of several dtypes ({', '.join(dtypes)}), and rounded values become one; "
                "use --values same"
            )
        if bits not in BITS:
            raise ValueError(f"packed values have 8 or 4 bits, got {bits}; write the rounded weights dense")
        self.layouts = {name: replace(layout, bits=bits) for name, layout in layouts.items()}
        self._bits = bits

    @property
    def values(self) -> str:
        """How the values are packed, see `VALUES`."""
        return next(name for name, bits in VALUES.items() if bits == self._bits)

    def parts(
        self,
        tensors: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        scales: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> dict[str, Tensor]:
        """What is stored of some tensors: those that become smaller are packed, the others stay as they are.

        Args:
            tensors: dense, by name.
            masks: the bits of their matrices as `masks.safetensors` has them; of a stack by `NAME.NUMBER`.
            scales: those that the matrices were rounded with, bfloat16 [R, ceil(C / 128)], named likewise;
                others are rounded here.
        """
        stored: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            layout = self.layouts.get(name)
            mask = _mask_of(name, layout, masks) if layout is not None else None
            if layout is None or mask is None:
                stored[name] = tensor
                continue
            if layout.bytes(mask) < tensor.nbytes:
                given = _scales_of(name, layout, scales)
                stored |= {name + part: t for part, t in pack(tensor, mask, layout, given).items()}
            else:
                stored[name] = tensor
        return stored

    def entry(self, headers: Mapping[str, TensorInfo | Any], load: Callable[[str], Tensor]) -> dict[str, Any]:
        """What config.json says of what was written; see `entry_of`.

        Args:
            headers: every tensor that was written, by name. load: reads one.
        """
        found = {name: layout.found(name, headers) for name, layout in self.layouts.items()}
        packed = {name: layout for name, layout in found.items() if layout is not None}
        kept = {
            name: layout.rows * layout.columns if layout.whole else int(load(f"{name}_rows")[-1])
            for name, layout in packed.items()
        }
        # Also of those that stay dense, whose masks are read from their weights.
        transposed = sorted(name for name, layout in self.layouts.items() if layout.transposed)
        return entry_of(packed, kept, self._bits) | ({"transposed": transposed} if transposed else {})


def _mask_of(name: str, layout: Layout, masks: Mapping[str, Tensor]) -> Tensor | None:
    """The mask of a tensor, uint8 [R, 8 ceil(C / 64)]; None where it stays dense.

    That is where none of its matrices is pruned, or one is not and would be rounded with the others.
    """
    if not layout.stacked:
        return widened(masks[name], layout.columns) if name in masks else None
    parts = [masks.get(f"{name}.{number}") for number in range(layout.stacked)]
    absent = [part is None for part in parts]
    if all(absent) or (any(absent) and layout.bits != 16):
        return None
    whole = packing.full_mask(layout.rows // layout.stacked, layout.columns)
    return torch.cat([whole if part is None else widened(part, layout.columns) for part in parts])


def _scales_of(name: str, layout: Layout, scales: Mapping[str, Tensor]) -> Tensor | None:
    """The scales of a tensor among those given, [R, ceil(C / 128)]; None where there are none."""
    if layout.bits == 16 or not scales:
        return None
    if not layout.stacked:
        return scales.get(name)
    return torch.cat([scales[f"{name}.{number}"] for number in range(layout.stacked)])


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
        _check_listed(self.layouts, source.tensors)
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
        layout = self.layouts[name]
        if layout.whole:
            return packing.full_mask(layout.rows, layout.columns)
        return self.source.load(f"{name}_mask")

    def load(self, name: str) -> Tensor:
        """One tensor on the CPU, dense."""
        if name not in self.layouts:
            return self.source.load(name)
        return unpack(read_parts(self.source.load, name, self.layouts[name]), self.layouts[name], name)

    @property
    def files(self) -> frozenset[str]:
        """The names of the weight files."""
        return self.source.files

    def check(self) -> None:
        """Raise `ValueError` if a weight file has changed."""
        self.source.check()


def read_parts(load: Callable[[str], Tensor], name: str, layout: Layout) -> dict[str, Tensor]:
    """The parts of a packed tensor, each read by its name."""
    return {part: load(name + part) for part in layout.parts}


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
        if dense is not None and dense not in PACKED_DTYPES:
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
        if bits != 16 and kept == rows * columns and name + "_rows" not in tensors:
            layout = layout.found(name, tensors) or layout
        _check_header(name, layout, kept, tensors)
        found[name] = layout
    return found


def _check_header(name: str, layout: Layout, kept: int, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise `ValueError` where the headers have other shapes than the config says."""
    rows, groups = layout.rows, -(-layout.columns // GROUP)
    entries = rows * bits_and_rows.row_entries(layout.columns, layout.bits) if layout.whole else kept
    wanted: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
        "": ((entries,), {16: ("F32", "F16", "BF16"), 8: ("I8",), 4: ("U8",)}[layout.bits]),
        "_mask": ((rows, 8 * layout.words), ("U8",)),
        "_rows": ((rows + 1,), ("I32", "I64")),
        "_scale": ((rows, groups), ("BF16",)),
    }
    if rows < 1 or layout.columns < 1 or (layout.stacked and rows % layout.stacked):
        raise ValueError(
            f"the packed tensor {shown(name)} has {rows} rows of {layout.columns}; it is damaged"
        )
    for part, (shape, stored) in ((part, wanted[part]) for part in layout.parts):
        tensor = tensors.get(name + part)
        # Values of 4 bits begin anew with every mask word: how many bytes they take follows from the mask.
        some = part == "" and layout.bits == 4 and not layout.whole
        if tensor is not None and tensor.stored in stored and (some or tensor.shape == shape):
            continue
        have = "nothing" if tensor is None else f"{tensor.stored} {list(tensor.shape)}"
        raise ValueError(
            f"config.json asks for {stored[0]} {list(shape)} in {shown(name + part)}, and the files hold "
            f"{have}; the packed checkpoint is damaged"
        )


def _check_listed(layouts: Mapping[str, Layout], tensors: Mapping[str, TensorInfo]) -> None:
    """Raise `ValueError` where the files hold a packed tensor that config.json does not name."""
    for name, tensor in tensors.items():
        parts = any(name + part in tensors for part in PARTS[1:])
        if parts and len(tensor.shape) == 1 and name not in layouts:
            raise ValueError(
                f"{shown(name)} lies packed in the files, and config.json does not name it in matrices; "
                "the packed checkpoint is damaged"
            )


def packing_entry(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a config says of a packed checkpoint; None for any other."""
    entry = config.get("quantization_config")
    return entry if isinstance(entry, dict) and entry.get("quant_method") == METHOD else None
