"""Keep masks on disk: uint8 [R, ceil(C / 8)], bit j % 8 (least significant first) of byte j // 8 is column j, 1 = kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


def pack(keep: Tensor) -> Tensor:
    """Bits of a bool mask [R, C] as uint8 [R, ceil(C / 8)], rows padded with zeros."""
    return torch.from_numpy(np.packbits(keep.cpu().numpy(), axis=1, bitorder="little"))


def unpack(packed: Tensor, columns: int) -> Tensor:
    """The bool mask [R, C] of packed bits."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=1, count=columns, bitorder="little").astype(bool))


class MaskWriter:
    """Writes `masks.safetensors` one matrix after the other: the sizes are known beforehand, so nothing is held in memory."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, int]]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "llmprune-keep-masks", "shapes": json.dumps(dict(shapes))}}
        end = 0
        for name, (rows, columns) in shapes.items():
            start, end = end, end + rows * -(-columns // 8)
            header[name] = {"dtype": "U8", "shape": [rows, -(-columns // 8)], "data_offsets": [start, end]}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._expected = list(shapes)
        self._file = path.open("wb")
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)

    def append(self, name: str, keep: Tensor) -> None:
        """The next mask, in the order of the shapes given at the start."""
        expected = self._expected.pop(0)
        assert name == expected, f"mask {name} written where {expected} is due"
        self._file.write(pack(keep).numpy().tobytes())

    def close(self) -> None:
        """Close the file; complete only after every mask was appended."""
        self._file.close()


def read_masks(path: Path) -> dict[str, Tensor]:
    """Every keep mask of a file, bool [R, C] by weight name. Raises `ValueError` where the file is damaged or something else."""
    try:
        with safe_open(path, framework="pt") as handle:
            shapes = json.loads((handle.metadata() or {})["shapes"])
            return {name: unpack(handle.get_tensor(name), shapes[name][1]) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is not a readable mask file ({error!r})") from None
