"""Keep masks on disk, one bit per weight.

A mask [R, C] is stored as uint8 [R, ceil(C / 8)]. Column j is bit j % 8 (0 the least significant) of byte j
// 8; 1 means kept.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmprune.checkpoint.files import layout, raw
from llmprune.common.messages import shown


def pack(keep: Tensor) -> Tensor:
    """Pack a bool mask [R, C] into uint8 [R, ceil(C / 8)]; rows are padded with zero bits."""
    return torch.from_numpy(np.packbits(keep.cpu().numpy(), axis=1, bitorder="little"))


def unpack(packed: Tensor, columns: int) -> Tensor:
    """The bool mask [R, C] from its packed form, C being `columns`."""
    bits = np.unpackbits(packed.numpy(), axis=1, count=columns, bitorder="little")
    return torch.from_numpy(bits.astype(bool))


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


def read_masks(path: Path) -> dict[str, Tensor]:
    """Every keep mask of a file, bool [R, C] by weight name.

    Raises `ValueError` if it is no mask file or damaged.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            shapes = json.loads((handle.metadata() or {})["shapes"])
            masks = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        for name, packed in masks.items():
            rows, columns = shapes[name]
            if packed.dtype != torch.uint8 or list(packed.shape) != [rows, -(-columns // 8)]:
                raise ValueError(
                    f"{name} is {packed.dtype} {list(packed.shape)}, not the bits of {rows} x {columns}"
                )
        return {name: unpack(packed, shapes[name][1]) for name, packed in masks.items()}
    except (SafetensorError, OSError, LookupError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a readable mask file ({shown(error)})") from None
