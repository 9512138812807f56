"""Keep masks on disk, one bit per weight.

A mask [R, C] is stored as uint8 [R, ceil(C / 8)]. Column j is bit j % 8 (0 the least significant) of byte j
// 8; 1 means kept.
"""

from __future__ import annotations

import abc
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmprune.checkpoint.contents import MASKS
from llmprune.checkpoint.files import Entry, WeightFile, layout, raw
from llmprune.common.messages import shown
from llmprune.kernels.plain import word_counts
from llmprune.numerics.counts import true_per_row


def pack(keep: Tensor) -> Tensor:
    """Pack a bool mask [R, C] into uint8 [R, ceil(C / 8)]; rows are padded with zero bits."""
    return torch.from_numpy(np.packbits(keep.cpu().numpy(), axis=1, bitorder="little"))


def unpack(packed: Tensor, columns: int) -> Tensor:
    """The bool mask [R, C] from its packed form, C being `columns`."""
    bits = np.unpackbits(packed.numpy(), axis=1, count=columns, bitorder="little")
    return torch.from_numpy(bits.astype(bool))


def where_bytes(weight: Tensor) -> Tensor:
    """Where the bytes of a weight are not all zero, bool [R, C]: what is kept of one that has no mask.

    -0.0 is kept, so that nothing is lost.
    """
    return weight.contiguous().view(_WHOLE[weight.dtype.itemsize]) != 0


_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class MaskFile:
    """The file `masks.safetensors`, written mask by mask.

    Its layout follows from the shapes (R, C) alone, so no masks are held in memory.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, int]]) -> None:
        metadata = {"format": "llmprune-keep-masks", "shapes": json.dumps(dict(shapes))}
        head, self._entries = layout({n: ("U8", (r, -(-c // 8))) for n, (r, c) in shapes.items()}, metadata)
        self._path = path
        # The masks of an unfinished run are kept; a link is not followed.
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        self._file = os.fdopen(handle, "r+b")
        self._file.write(head)
        self._file.truncate(max((e.end for e in self._entries.values()), default=len(head)))

    def write(self, packed: Mapping[str, Tensor]) -> None:
        """Write packed masks durably to their places in the file.

        Raises `OSError` if they cannot be written.
        """
        for name, bits in packed.items():
            self._file.seek(self._entries[name].start)
            self._file.write(raw(bits))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; it is complete once every mask was written."""
        self._file.close()


class KeepMasks(abc.ABC):
    """Keep masks of matrices, read one at a time.

    Attributes:
        path: of their file or folder.
        folder: the output folder that they belong to, whose record tells of them; None for a file of its own.
        shapes: weight name -> (R, C).
    """

    path: Path
    folder: Path | None
    shapes: dict[str, tuple[int, int]]

    @abc.abstractmethod
    def load(self, name: str) -> Tensor:
        """One keep mask, bool [R, C]."""

    @functools.cached_property
    def digest(self) -> str:
        """A fingerprint of names, shapes and masks: SHA-256."""
        whole = hashlib.sha256()
        for name, shape in sorted(self.shapes.items()):
            whole.update(repr((name, *shape)).encode() + raw(pack(self.load(name))))
        return f"sha256:{whole.hexdigest()}"

    @functools.cached_property
    def sparsity(self) -> float:
        """The share of weights that they prune."""
        kept = sum(int(true_per_row(self.load(name)).sum()) for name in self.shapes)
        return 1 - kept / sum(rows * columns for rows, columns in self.shapes.values())


class Masks(KeepMasks):
    """The keep masks of a file.

    Raises:
        ValueError: the file is no mask file, is damaged, or changes while it is in use.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, path.parent if path.name == MASKS else None
        try:
            self._file = WeightFile(path)
            with safe_open(path, framework="pt") as handle:
                listed = json.loads((handle.metadata() or {})["shapes"])
            self.shapes = {name: _shape_of(name, entry, listed) for name, entry in self._file.entries.items()}
            self._file.check()
        except (SafetensorError, OSError, LookupError, ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is not a readable mask file ({shown(error)})") from None
        if not self.shapes:
            raise ValueError(f"{path} holds no masks")

    def load(self, name: str) -> Tensor:
        """One keep mask, bool [R, C]."""
        return unpack(self._file.load(name), self.shapes[name][1])

    def kept(self, name: str) -> int:
        """How many weights one mask keeps."""
        bits = self._file.load(name).flatten()
        words = torch.nn.functional.pad(bits, (0, -len(bits) % 8))
        return int(word_counts(words.view(1, -1)).sum())


def _shape_of(name: str, entry: Entry, listed: Mapping[str, Any]) -> tuple[int, int]:
    """The shape (R, C) of a mask, by the metadata. Raises an error where the stored bits do not fit it."""
    shape = listed[name]
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
        raise ValueError(f"{name} has shape {shape}")
    rows, columns = shape
    if entry.dtype != "U8" or entry.shape != (rows, -(-columns // 8)):
        raise ValueError(f"{name} is {entry.dtype} {list(entry.shape)}, not the bits of {rows} x {columns}")
    return rows, columns


def read_masks(path: Path) -> dict[str, Tensor]:
    """Every keep mask of a file, bool [R, C] by weight name.

    Raises `ValueError` if it is no mask file or damaged.
    """
    masks = Masks(path)
    return {name: masks.load(name) for name in masks.shapes}
