"""The keep masks of an output folder: from their file, or from its packed weights."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from llmprune.checkpoint.contents import CONFIG, MASKS, RECORD
from llmprune.checkpoint.masks import KeepMasks, Masks, where_bytes
from llmprune.checkpoint.packed import Packed
from llmprune.checkpoint.packed_entry import packing_entry
from llmprune.checkpoint.reader import Checkpoint, read_json, read_record
from llmprune.common.messages import shown
from llmprune.kernels import layout as bits_and_rows

Shape = tuple[int, int]


class PackedMasks(KeepMasks):
    """The keep masks of a packed folder, as the same folder would have them in `masks.safetensors`.

    They are those of the matrices that its record names, without a record those of its packed matrices. Of a
    matrix that stayed dense the weights whose bytes are not all zero are kept.

    Raises:
        ValueError: the folder is not packed, or damaged; its record is of other matrices.
    """

    def __init__(self, folder: Path) -> None:
        self.path = self.folder = folder
        entry = packing_entry(read_json(folder / CONFIG))
        if entry is None:
            raise ValueError(f"{folder} is not packed; name an output folder of llmprune")
        self._source = Packed(Checkpoint(folder), entry)
        listed = entry.get("transposed", ())
        self._transposed = frozenset(listed if isinstance(listed, list) else ())
        packed = {
            key: (layout.rows // max(1, layout.stacked), layout.columns)
            for name, layout in self._source.layouts.items()
            for key in ([f"{name}.{number}" for number in range(layout.stacked)] or [name])
        }
        named = recorded_matrices(folder)
        self.shapes = packed if named is None else named
        for key, shape in self.shapes.items():
            if packed.get(key, shape) != shape or not (key in packed or self._dense(key, shape)):
                raise ValueError(
                    f"{folder / RECORD} names {shown(key)} of {shape[0]} x {shape[1]}, which the weights do "
                    "not hold; restore the original record"
                )
        self.shapes = {key: self.shapes[key] for key in sorted(self.shapes, key=_by_number)}
        if not self.shapes:
            raise ValueError(f"{folder} holds no masks")
        self._loaded: tuple[str, Tensor] | None = None

    def load(self, name: str) -> Tensor:
        """One keep mask, bool [R, C]."""
        tensor, number = self._place(name)
        rows, columns = self.shapes[name]
        packed = tensor in self._source.layouts
        if self._loaded is None or self._loaded[0] != tensor:  # a stack is read once for all its matrices
            load = self._source.load_mask if packed else self._source.load
            self._loaded = tensor, load(tensor)
        whole = self._loaded[1]
        if not packed:
            return where_bytes(self._matrix(tensor, whole, number))
        bits = whole[number * rows : (number + 1) * rows]
        try:
            bits_and_rows.counts(bits, columns)
        except ValueError as error:
            raise ValueError(f"the packed tensor {shown(tensor)} is damaged: {error}") from None
        return bits_and_rows.keep_of(bits, columns)

    def _place(self, key: str) -> tuple[str, int]:
        """The tensor that holds a matrix, and the number of the matrix in it."""
        if key in self._source.tensors:
            return key, 0
        name, _, number = key.rpartition(".")
        known = name in self._source.tensors and re.fullmatch("[0-9]{1,9}", number)
        return (name, int(number)) if known else ("", 0)

    def _matrix(self, name: str, tensor: Tensor, number: int) -> Tensor:
        """A matrix of a tensor that stayed dense, [R, C]."""
        part = tensor[number] if tensor.ndim == 3 else tensor
        return part.mT if name in self._transposed else part

    def _dense(self, key: str, shape: Shape) -> bool:
        """Whether a tensor that stayed dense holds a matrix of this shape."""
        name, number = self._place(key)
        info = self._source.tensors.get(name)
        if info is None or info.dtype is None or len(info.shape) != (2 if key == name else 3):
            return False
        size = info.shape[-2:][::-1] if name in self._transposed else info.shape[-2:]
        return size == shape and (key == name or number < info.shape[0])


def recorded_matrices(folder: Path) -> dict[str, Shape] | None:
    """The matrices that the record of a folder names, with their shapes; None where it has no record."""
    if not (folder / RECORD).is_file():
        return None
    rows = read_record(folder).get("matrices")
    found: dict[str, Shape] = {}
    for row in rows if isinstance(rows, list) else [None]:
        name, shape = (row.get("name"), row.get("shape")) if isinstance(row, dict) else (None, None)
        sizes = shape if isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape) else ()
        if not isinstance(name, str) or len(sizes) != 2:
            raise ValueError(
                f"{folder / RECORD} is not a record of this program; remove it or restore the original"
            )
        found[name] = (sizes[0], sizes[1])
    return found


def _by_number(name: str) -> str:
    """A key that sorts block 2 before block 10."""
    return re.sub("[0-9]+", lambda found: found[0].zfill(12), name)


def holds_masks(folder: Path) -> bool:
    """Whether a folder has keep masks: in a file of their own, or in its packed weights."""
    return (folder / MASKS).is_file() or _packed(folder)


def _packed(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and packing_entry(read_json(folder / CONFIG)) is not None


def masks_at(path: Path) -> KeepMasks:
    """The masks of an output folder, dense or packed, or of a file.

    Raises:
        ValueError: there are none.
    """
    if not path.exists():
        raise ValueError(f"no such file or folder: {path}; name a file of masks or an output folder")
    if path.is_dir() and not holds_masks(path):
        raise ValueError(
            f"{path} has no {MASKS}; name an output folder of llmprune prune, or a file of masks"
        )
    if path.is_dir() and not (path / MASKS).is_file():
        return PackedMasks(path)
    return Masks(path / MASKS if path.is_dir() else path)
