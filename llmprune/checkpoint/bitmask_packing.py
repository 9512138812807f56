"""Writes matrices in the format sparse-bitmask of compressed-tensors; `bitmask` says what it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from llmprune.checkpoint.bitmask import BITS, SHAPE, WEIGHT, sparse_bitmask_config, sparse_bitmask_tensors

_NIBBLES = np.array([number.bit_count() for number in range(16)], dtype=np.uint8)


class BitmaskPacking:
    """Stores matrices as bits and nonzero values where that is smaller, as `Packing` does in its own format.

    Args:
        names: of the tensors that may be stored so; each is one matrix, and its name ends in `.weight`. They
            are an attribute, too.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        self._names = frozenset(self.names)

    def parts(
        self, tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor], scales: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What is stored of some tensors: those that become smaller as bits and values, the others as they
        are. What is kept is what is not zero, so `masks` say nothing here, nor do `scales`.
        """
        stored: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            parts = sparse_bitmask_tensors(name, tensor) if name in self._names else {}
            smaller = sum(part.nbytes for part in parts.values()) < tensor.nbytes
            stored |= parts if parts and smaller else {name: tensor}
        return stored

    def entry(self, headers: Mapping[str, Any], load: Callable[[str], Tensor]) -> dict[str, Any]:
        """What config.json says of what was written.

        Args:
            headers: every tensor that was written, by name. load: reads one.
        """
        stems = sorted(name.removesuffix(BITS) for name in headers if self._written(name))
        weights = kept = 0
        halved = bool(stems)
        for stem in stems:
            rows, columns = load(stem + SHAPE).tolist()
            bits = load(stem + BITS).numpy()
            each = np.stack([_NIBBLES[bits & 15], _NIBBLES[bits >> 4]])
            weights, kept = weights + rows * columns, kept + int(each.sum(dtype=np.int64))
            halved = halved and columns % 4 == 0 and int(each.max()) <= 2
        sparsity = 1 - kept / weights if weights else 0.0
        structure = "2:4" if halved else "unstructured"
        entry: dict[str, Any] = sparse_bitmask_config([stem + WEIGHT for stem in stems], sparsity, structure)
        return entry

    def _written(self, name: str) -> bool:
        return name.endswith(BITS) and name.removesuffix(BITS) + WEIGHT in self._names
