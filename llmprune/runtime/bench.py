"""Products with a model's own matrices, dense against packed: how many seconds each takes on this CPU.

The two take turns, so that what else the machine does falls on both. In a round all matrices follow one
another, as they do in a model: once they are more than the cache holds, each comes from memory.
R outputs, C inputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from llmprune.checkpoint.packed import Packed
from llmprune.checkpoint.packed_tensor import pack, read_parts, unpack
from llmprune.checkpoint.reader import WeightSource
from llmprune.kernels.layout import bits_of
from llmprune.model.skeleton import Skeleton
from llmprune.model.target import Target
from llmprune.model.targets import all_targets, packed_layouts
from llmprune.runtime.layers import PackedLinear

ROUNDS = 30  # at most so many are counted
CONTESTANTS = ("dense", "packed")
Size = tuple[int, int]


@dataclass(frozen=True)
class Pair:
    """One matrix [R, C] twice: dense, and as the layer that computes with it packed."""

    dense: Tensor
    packed: PackedLinear

    @property
    def bytes(self) -> Size:
        """Of the dense and of the packed matrix."""
        return self.dense.nbytes, sum(part.nbytes for part in self.packed.parts().values())

    def product(self, contestant: str, x: Tensor) -> Tensor:
        """Of x [n, C] the product [n, R], by one of the two."""
        return linear(x, self.dense) if contestant == "dense" else self.packed(x)


@dataclass(frozen=True)
class Enough:
    """How many matrices are measured with.

    Attributes:
        packed: bytes of packed matrices that are enough.
        dense: bytes of dense ones that are not exceeded, but for one matrix of each shape.
        seconds: after which no more are read, but for one of each shape.
    """

    packed: int
    dense: int
    seconds: float


class Matrices:
    """The linear layers of a checkpoint whose weight is packed, or would be.

    Matrices of stacked experts are none: they are unpacked when their expert is at work.

    Args:
        skeleton: of the model.
        source: its weights, dense or packed.
        bits: of the values of a dense checkpoint, see `contracts.VALUES`.
    """

    def __init__(self, skeleton: Skeleton, source: WeightSource, bits: int = 16) -> None:
        self._source, self._packed = source, source if isinstance(source, Packed) else None
        made = {name: replace(layout, bits=bits) for name, layout in packed_layouts(skeleton).items()}
        self._layouts = self._packed.layouts if self._packed else made
        self.groups: dict[Size, list[Target]] = {}
        for target in all_targets(skeleton):
            layout = self._layouts.get(target.tensor)
            if target.module is not None and layout is not None and not layout.stacked:
                self.groups.setdefault(target.shape, []).append(target)

    def pair(self, target: Target) -> Pair | None:
        """A matrix twice; None where packing would not make it smaller."""
        name, layout = target.tensor, self._layouts[target.tensor]
        if self._packed is not None:
            parts = read_parts(self._packed.source.load, name, layout)
        else:
            weight = self._source.load(name)
            mask = bits_of(layout.matrix(weight) != 0)
            if layout.bytes(mask) >= weight.nbytes:
                return None
            parts = pack(weight, mask, layout)
            layout = layout.found(name, {name + part for part in parts}) or layout
        layer = PackedLinear(layout, len(parts[""]), None)
        layer.load_state_dict({f"weight{part}": tensor for part, tensor in parts.items()}, assign=True)
        layer.check(name)
        return Pair(layout.matrix(unpack(parts, layout, name)), layer)

    def any_packed(self) -> bool:
        """Whether there is a tensor that is packed, or would be. Of an unpruned model it reads all."""
        return bool(self._layouts) if self._packed else any(saved > 0 for saved in self._savings())

    def packed_bytes(self) -> int:
        """Bytes of all tensors of the checkpoint as they are packed, or would be: reads a dense one whole."""
        if self._packed is not None:
            return sum(tensor.bytes for tensor in self._packed.source.tensors.values())
        return sum(t.bytes for t in self._source.tensors.values()) - sum(self._savings())

    def _savings(self) -> Iterator[int]:
        """By how many bytes each tensor would become smaller."""
        for name, layout in self._layouts.items():
            weight = self._source.load(name)
            yield max(0, weight.nbytes - layout.bytes(bits_of(layout.matrix(weight) != 0)))

    def largest(self) -> dict[Size, list[Target]]:
        """The matrices of the largest shape alone."""
        size = max(self.groups, key=lambda size: size[0] * size[1], default=None)
        return {} if size is None else {size: self.groups[size]}

    def some(self, groups: Mapping[Size, list[Target]], enough: Enough) -> dict[Size, list[Pair]]:
        """Matrices of every shape of `groups`, from blocks all over the model."""
        found: dict[Size, list[Pair]] = {}
        started, dense, packed = time.monotonic(), 0, 0
        for size, target in _in_turn({size: _spread(group) for size, group in groups.items()}):
            done = packed >= enough.packed or dense >= enough.dense
            if size in found and (done or time.monotonic() - started > enough.seconds):
                continue
            pair = self.pair(target)
            if pair is not None:
                found.setdefault(size, []).append(pair)
                dense, packed = dense + pair.bytes[0], packed + pair.bytes[1]
        return found


def _spread(group: list[Target]) -> list[Target]:
    """The targets in an order whose beginning is spread over all of them."""
    return [group[n] for n in sorted(range(len(group)), key=lambda n: n * 0.6180339887 % 1)]


def _in_turn(lists: Mapping[Size, list[Any]]) -> Iterator[tuple[Size, Any]]:
    """The first of every list, then the second, and so on."""
    for number in range(max(map(len, lists.values()), default=0)):
        yield from ((size, items[number]) for size, items in lists.items() if number < len(items))


def medians(
    seconds: float,
    measure: Callable[[str], Mapping[Any, list[float]]],
    contestants: Sequence[str] = CONTESTANTS,
) -> tuple[dict[str, dict[Any, float]], int]:
    """Let contestants measure in turn, round after round, every other round in the opposite order.

    The first round warms up; it counts only where it is the only one.

    Args:
        seconds: after which no new round begins.
        measure: of a contestant the seconds that each of its tasks took in one round.

    Returns:
        By contestant and task the median, and how many rounds were counted.
    """
    ended = time.monotonic() + seconds
    rounds: list[dict[str, Mapping[Any, list[float]]]] = []
    while len(rounds) <= ROUNDS and (not rounds or time.monotonic() < ended):
        order = contestants[:: 1 if len(rounds) % 2 == 0 else -1]
        rounds.append({who: measure(who) for who in order})
    counted = rounds[1:] or rounds
    found = {
        who: {task: median(t for r in counted for t in r[who][task]) for task in counted[0][who]}
        for who in contestants
    }
    return found, len(counted)


def compared(dense: float, packed: float) -> dict[str, float]:
    """The seconds of both, and how many times as fast the packed one is."""
    return {"dense_seconds": dense, "packed_seconds": packed, "faster_by": dense / packed}


@torch.no_grad()
def products(
    pairs: Mapping[Size, list[Pair]], counts: Mapping[Size, int], tokens: int, seconds: float
) -> dict[str, Any]:
    """Compare products of `tokens` rows with dense and with packed matrices.

    Args:
        pairs: by shape. counts: how many matrices of a shape the model has.
        tokens: rows of the input.
        seconds: that this may take, but for one round.

    Returns:
        `shapes`, by shape what `compared` says of one product; `all`, the same of every matrix of these
        shapes once; `rounds`.
    """
    generator = torch.Generator().manual_seed(0)
    inputs: dict[Size, Tensor] = {}
    for (rows, columns), some in pairs.items():
        x = torch.randn(tokens, columns, generator=generator, dtype=torch.float32)
        inputs[rows, columns] = x.to(some[0].dense.dtype)

    def measure(contestant: str) -> dict[Size, list[float]]:
        taken: dict[Size, list[float]] = {size: [] for size in pairs}
        for size, pair in _in_turn(pairs):
            started = time.perf_counter()
            pair.product(contestant, inputs[size])
            taken[size].append(time.perf_counter() - started)
        return taken

    found, rounds = medians(seconds, measure)
    whole = (sum(counts[size] * found[who][size] for size in pairs) for who in CONTESTANTS)
    return {
        "shapes": {size: compared(*(found[who][size] for who in CONTESTANTS)) for size in pairs},
        "all": compared(*whole),
        "rounds": rounds,
    }
