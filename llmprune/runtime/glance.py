"""What a run tells of its result without much work: its size packed, and a look at its speed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmprune.checkpoint.masks import Masks
from llmprune.checkpoint.packed_tensor import Layout
from llmprune.checkpoint.reader import WeightSource
from llmprune.kernels import library
from llmprune.runtime.bench import Enough, Matrices, products

TOKENS = (1, 16)
_LEAST = 1 << 20  # weights of a matrix: of smaller ones the call takes longer than the product
_READING, _MEASURING = 3.0, 1.5  # seconds: for all matrices, and for each number of tokens


def packed_bytes(source: WeightSource, layouts: Mapping[str, Layout], masks: Masks) -> int:
    """Bytes of the tensors of a dense checkpoint if it were packed with these masks.

    Args:
        layouts: of the tensors that hold matrices, see `packed_layouts`. masks: of a run, by name.
    """
    kept: dict[str, int] = {}
    for name, (rows, columns) in masks.shapes.items():
        tensor = name if name in layouts else name.rpartition(".")[0]
        # Of a stack, matrices without a mask are kept whole.
        known = kept.setdefault(tensor, layouts[tensor].rows * layouts[tensor].columns)
        kept[tensor] = known - rows * columns + masks.kept(name)
    sizes = {name: tensor.bytes for name, tensor in source.tensors.items()}
    return sum(
        min(size, layouts[name].bytes_of(kept[name])) if name in kept else size
        for name, size in sizes.items()
    )


def too_small(matrices: Matrices) -> list[int] | None:
    """The shape of the largest matrices where even they are too small to gain anything; else None."""
    rows, columns = max(matrices.groups, key=lambda size: size[0] * size[1], default=(_LEAST, 1))
    return [rows, columns] if rows * columns < _LEAST else None


def speed(matrices: Matrices, cache: int, memory: int) -> dict[str, Any]:
    """Products with the largest matrices, dense against packed, in a few seconds.

    Args:
        matrices: of a checkpoint. cache: bytes of the last-level cache.
        memory: bytes of dense matrices that may be read.

    Returns:
        `kernels`, and where there are native ones `shape`, `count`, `measured` (how many of them) and
        `tokens`: by their number what `runtime.bench.compared` says. Empty where none is packed.
    """
    if not library.available():
        return {"kernels": library.status()}
    pairs = matrices.some(matrices.largest(), Enough(2 * cache, memory, _READING))
    if not pairs:
        return {}
    (size, some), *_ = pairs.items()
    counts = {size: len(matrices.groups[size])}
    found = {n: products(pairs, counts, n, _MEASURING)["shapes"][size] for n in TOKENS}
    return {
        "kernels": library.status(),
        "shape": list(size),
        "count": counts[size],
        "measured": len(some),
        "tokens": {str(n): entry for n, entry in found.items()},
    }
