"""Reads a packed checkpoint; `packed_tensor` says how a tensor lies in it, `packed_entry` what names them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llmprune.checkpoint.files import NAMES
from llmprune.checkpoint.packed_entry import layouts_of
from llmprune.checkpoint.packed_tensor import PARTS, read_parts, unpack
from llmprune.checkpoint.reader import Checkpoint, TensorInfo
from llmprune.contracts import VALUES
from llmprune.kernels import packing


class Packed:
    """A weight source that has the tensors of a packed checkpoint as dense ones.

    Args:
        source: the checkpoint as it lies in its files.
        entry: what its config.json says of it, see `packed_entry.entry_of`.

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
