"""What the blocks of a model get beside the hidden states: masks, rotary tables, per-layer embeddings, ...

To get it exactly as the model makes it, the model itself is run with functions in place of its blocks that
record their arguments. Most arguments depend on the shape of a micro-batch alone and are recorded once for
every size. Those that depend on the tokens are kept for every sequence. N sequences, n of a micro-batch.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments of a block after the hidden states: args, kwargs
Rows = slice | list[int]
Store = Callable[[tuple[int, ...], torch.dtype], Tensor]  # allocates a tensor of a shape and dtype
Dicts = dict[str, dict[Any, Any]]
Record = Callable[[slice], list[Call | None]]  # records the arguments of every block for some sequences


def dicts_in(kwargs: dict[str, Any]) -> Dicts:
    """The dicts among the arguments of a block, as they are now."""
    return {name: dict(value) for name, value in kwargs.items() if isinstance(value, (dict, UserDict))}


class Arguments:
    """The arguments of every block for any of the N sequences.

    Args:
        record: records them for a slice of the sequences.
        tokens: int64 [N, T].
        store: allocates what is kept for every sequence.
        device: of the arguments.

    Raises:
        ValueError: they depend on the tokens in a way that cannot be kept sequence by sequence.
    """

    def __init__(self, record: Record, tokens: Tensor, store: Store, device: torch.device) -> None:
        self._record, self._count, self._store, self._device = record, len(tokens), store, device
        self._of_size: dict[int, list[Call | None]] = {}
        # Which leaves of a block's arguments depend on the tokens: (block, leaf) -> the kept tensor; and the
        # axis of the sequences in it. Blocks that get the same tensor share what is kept.
        self._varying: dict[tuple[int, int], int] = {}
        self._kept: dict[int, tuple[Tensor | None, int]] = {}
        # What blocks hand to later blocks in a dict among the arguments, by key and place in its value.
        # Of every state the version of the block that wrote last, and the one before: a block may run again.
        self._states: dict[tuple[str, Any], list[_Version]] = {}
        # (block, leaf) -> the earlier block that returned it, and its place in what that returned.
        self._carried: dict[tuple[int, int], tuple[int, int]] = {}
        others = (tokens != tokens[0]).any(dim=1).nonzero()
        if len(others):
            self._compare(int(others[0]))

    def _compare(self, sequence: int) -> None:
        """Find out what differs between the first sequence and another one."""
        one, other = self._record(slice(0, 1)), self._record(slice(sequence, sequence + 1))
        self._of_size[1] = one
        shared: dict[int, int] = {}
        both: list[Call | None] = []
        for block, (a, b) in enumerate(zip(one, other, strict=True)):
            leaves, others = tree_flatten(a)[0], tree_flatten(b)[0]
            for leaf, (x, y) in enumerate(zip(leaves, others, strict=True)):
                if not isinstance(x, Tensor) or not isinstance(y, Tensor) or _near(x, y):
                    continue
                both = both or self._record(slice(0, 2))
                axis = _axis(x, tree_flatten(both[block])[0][leaf])
                number = shared.setdefault(id(x), len(shared))
                self._varying[block, leaf] = number
                self._kept[number] = (None, axis)
        if both:
            self._of_size[2] = both

    def note_carried(self, block: int, call: Call, item: Tensor, source: tuple[int, int]) -> None:
        """Note whether a block gets an item that an earlier one returned beside the hidden states.

        `source`: that block, and the place of the item in what it returned.
        """
        for leaf, value in enumerate(tree_flatten(call)[0]):
            if value is item:
                self._carried[block, leaf] = source

    def keep_carried(self, block: int, result: Sequence[Any], rows: Rows) -> None:
        """Keep what later blocks get of what a block returned."""
        for number, place in set(self._carried.values()):
            if number == block and isinstance(result[place], Tensor):
                self._keep_state(("", (number, place)), block, result[place], rows)

    @property
    def varies(self) -> bool:
        """Whether some arguments depend on the tokens."""
        return bool(self._varying)

    def keep(self, part: slice, calls: list[Call | None]) -> None:
        """Keep what depends on the tokens, from the arguments recorded for some sequences."""
        done = set()
        for (block, leaf), number in self._varying.items():
            if number in done:
                continue
            done.add(number)
            kept, axis = self._kept[number]
            value = tree_flatten(calls[block])[0][leaf].detach().movedim(axis, 0)
            if kept is None:
                kept = self._store((self._count, *value.shape[1:]), value.dtype)
                self._kept[number] = (kept, axis)
            kept[part] = value

    def of(self, block: int, rows: Rows) -> Call | None:
        """The arguments of a block for some sequences; None for a block that does not run on text."""
        size = self._size(rows)
        if size not in self._of_size:
            self._of_size[size] = self._record(slice(0, size))
        call = self._of_size[size][block]
        if call is None:
            return None
        args, kwargs = call
        if self.varies or self._carried:
            leaves, form = tree_flatten(call)
            for (number, leaf), source in self._carried.items():
                read = self._read(("", source), block, rows) if number == block else ()
                if read:
                    leaves[leaf] = read[0]
            for (number, leaf), kept in self._varying.items():
                if number == block:
                    stored, axis = self._kept[kept]
                    assert stored is not None
                    leaves[leaf] = stored[rows].to(self._device).movedim(0, axis)
            args, kwargs = tree_unflatten(leaves, form)
        return args, {name: self._filled(name, value, block, rows) for name, value in kwargs.items()}

    def _filled(self, name: str, value: Any, block: int, rows: Rows) -> Any:
        """A dict among the arguments with what earlier blocks have put into it; anything else as it is."""
        if not isinstance(value, (dict, UserDict)):
            return value
        fresh: MutableMapping[Any, Any] = type(value)(value)
        for argument, key in self._states:
            read = self._read((argument, key), block, rows) if argument == name else ()
            if read:
                fresh[key] = read if len(read) > 1 else read[0]
        return fresh

    def _read(self, where: tuple[str, Any], block: int, rows: Rows) -> tuple[Tensor, ...]:
        """A state as a block finds it: what the last block before it has written; empty if none has."""
        versions = [v for v in self._states.get(where, []) if v.writer < block]
        if not versions:
            return ()
        return tuple(t[rows].to(self._device).movedim(0, axis) for t, axis in versions[-1].tensors)

    def keep_states(self, block: int, before: Dicts, kwargs: dict[str, Any], rows: Rows) -> None:
        """Keep what a block has put into a dict among its arguments, for later blocks.

        `before`: what was in those dicts.
        """
        for name, was in before.items():
            for key, put in kwargs[name].items():
                if was.get(key) is not put:
                    self._keep_state((name, key), block, put, rows)

    def _keep_state(self, where: tuple[str, Any], block: int, put: Any, rows: Rows) -> None:
        tensors = [t for t in (put if isinstance(put, (tuple, list)) else (put,)) if isinstance(t, Tensor)]
        versions = self._states.setdefault(where, [])
        if not versions or versions[-1].writer != block:
            made = [self._room(where, tensor, self._size(rows)) for tensor in tensors]
            versions[:] = [*versions[-1:], _Version(block, made)]
        for (kept, axis), tensor in zip(versions[-1].tensors, tensors, strict=True):
            kept[rows] = tensor.detach().movedim(axis, 0).to(kept.device)

    def _room(self, where: tuple[str, Any], tensor: Tensor, size: int) -> tuple[Tensor, int]:
        """A tensor for the states of all sequences, and the axis of the sequences in those of some."""
        axis = next((i for i, length in enumerate(tensor.shape) if length == size), None)
        if axis is None:
            raise ValueError(
                f"a block hands on {where[1]!r} of shape {list(tensor.shape)} to later blocks, not a "
                "row per sequence; this architecture is not supported"
            )
        shape = tensor.movedim(axis, 0).shape[1:]
        return self._store((self._count, *shape), tensor.dtype), axis

    def _size(self, rows: Rows) -> int:
        return len(range(*rows.indices(self._count))) if isinstance(rows, slice) else len(rows)


class _Version(NamedTuple):
    """What a block has written of a state: tensors of all sequences, with the axis of the sequences."""

    writer: int
    tensors: list[tuple[Tensor, int]]


def same_arguments(one: Call, other: Call) -> bool:
    """Whether two calls have the same tensors as arguments, up to rounding."""
    pairs = zip(tree_flatten(one)[0], tree_flatten(other)[0], strict=False)
    return all(_near(x, y) for x, y in pairs if isinstance(x, Tensor) and isinstance(y, Tensor))


def _axis(one: Tensor, two: Tensor) -> int:
    """The axis of the sequences, from an argument for one sequence and the same for two."""
    changed = [i for i, (a, b) in enumerate(zip(one.shape, two.shape, strict=True)) if (a, b) == (1, 2)]
    if len(changed) != 1:
        raise ValueError(
            "the blocks of this model get arguments that depend on the tokens of all sequences together; "
            "this architecture is not supported"
        )
    return changed[0]


def _near(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are equal up to rounding: rotary tables may differ in the last bit."""
    if x.shape != y.shape or x.dtype != y.dtype or not x.is_floating_point():
        return torch.equal(x, y)
    return torch.allclose(x.float(), y.float(), rtol=1e-2, atol=1e-2)
