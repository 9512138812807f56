"""A weight source in which tensors that were written already replace those of another source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from llmprune.checkpoint.files import WeightFile
from llmprune.checkpoint.packed_tensor import Layout, read_parts, unpack
from llmprune.checkpoint.reader import TensorInfo, WeightSource


class Overlay:
    """A weight source in which the tensors of some safetensors files replace those of another source.

    Args:
        source: the other source.
        files: the files.
        layouts: of the tensors that may be packed in them, by name.
    """

    def __init__(
        self,
        source: WeightSource,
        files: Sequence[Path],
        layouts: Mapping[str, Layout] = MappingProxyType({}),
    ) -> None:
        self._source, self._layouts = source, layouts
        self._where = {name: file for file in map(WeightFile, files) for name in file.entries}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors, by name."""
        return self._source.tensors

    def load(self, name: str) -> Tensor:
        """One tensor on the CPU, dense."""
        if name not in self._where:
            return self._source.load(name)
        layout = self._layouts[name].found(name, self._where) if name in self._layouts else None
        if layout is None:
            return self._where[name].load(name)
        return unpack(read_parts(lambda part: self._where[part].load(part), name, layout), layout, name)

    def check(self) -> None:
        """Raise `ValueError` if the source or one of the files has changed."""
        self._source.check()
        for file in dict.fromkeys(self._where.values()):
            file.check()
