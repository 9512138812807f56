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
Record = Callable[[Rows], list[Call | None]]  # records the arguments of every block for some sequences


def dicts_in(kwargs: dict[str, Any]) -> Dicts:
    """The dicts among the arguments of a block, as they are now."""
    return {name: dict(value) for name, value in kwargs.items() if isinstance(value, (dict, UserDict))}


class Arguments:
    """The arguments of every block for any of the N sequences.

    Args:
        record: records them for some sequences.
        count: N.
        store: allocates what is kept for every sequence.
        device: of the arguments.
    """

    def __init__(self, record: Record, count: int, store: Store, device: torch.device) -> None:
        self._record, self._count, self._store, self._device = record, count, store, device
        self._of_size: dict[int, list[Call | None]] = {}  # of the first sequence, so many times
        # Which leaves of a block's arguments depend on the tokens, and what is kept of them. Blocks that get
        # the same tensor share what is kept.
        self._varying: dict[tuple[int, int], _Kept] = {}
        # What blocks hand to later blocks in a dict among the arguments, by argument and key. Of every state
        # the version of the block that wrote last, and the one before: a block may run again.
        self._states: dict[tuple[str, Any], list[_Version]] = {}
        # (block, leaf) -> the earlier block that returned it, and its place in what that returned.
        self._carried: dict[tuple[int, int], tuple[int, int]] = {}

    @property
    def stateless(self) -> bool:
        """Whether no block gets, or has got, anything from an earlier one beside the hidden states."""
        return not self._states and not self._carried

    def notice(self, part: slice, calls: list[Call | None]) -> bool:
        """Keep what depends on the tokens, from the arguments recorded for some sequences.

        Returns:
            Whether an argument was not known to depend on them: then earlier sequences must be noticed again.

        Raises:
            ValueError: an argument depends on the tokens in a way that cannot be kept sequence by sequence.
        """
        usual = self._for_size(self._size(part))
        known: dict[int, _Kept] = {}  # by id of a tensor: many blocks get the same one
        usual_ones: set[int] = set()  # the same: of tensors that do not depend on the tokens
        new = False
        for block, (call, same) in enumerate(zip(calls, usual, strict=True)):
            values, others = _leaves(call), _leaves(same)
            if len(values) != len(others):
                raise _of_all_together()
            for leaf, (value, other) in enumerate(zip(values, others, strict=True)):
                if not isinstance(value, Tensor):
                    if isinstance(value, (bool, int, float, str)) and value != other:
                        raise _of_all_together()
                    continue
                kept = self._varying.get((block, leaf)) or known.get(id(value))
                if kept is None and id(value) not in usual_ones:
                    if _near(value, other):
                        usual_ones.add(id(value))
                    else:
                        kept = _Kept(self._count, self._axis_of(block, leaf), self._store)
                if kept is None:
                    continue
                if known.get(id(value)) is not kept:
                    kept.keep(part, value)
                    known[id(value)] = kept
                if (block, leaf) not in self._varying:
                    self._varying[block, leaf], new = kept, True
        return new

    def _for_size(self, size: int) -> list[Call | None]:
        """The arguments of every block for the first sequence so many times."""
        if size not in self._of_size:
            self._of_size[size] = self._record([0] * size)
        return self._of_size[size]

    def _axis_of(self, block: int, leaf: int) -> int:
        """The axis of the sequences in an argument, from that for one sequence and for two."""
        one, two = (_leaves(self._for_size(size)[block])[leaf].shape for size in (1, 2))
        changed = [i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b]
        if len(one) != len(two) or len(changed) != 1 or one[changed[0]] != 1:
            raise _of_all_together()
        return changed[0]

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

    def of(self, block: int, rows: Rows) -> Call | None:
        """The arguments of a block for some sequences; None for a block that does not run on text."""
        call = self._for_size(self._size(rows))[block]
        if call is None:
            return None
        args, kwargs = call
        if self._varying or self._carried:
            leaves, form = tree_flatten(call)
            for (number, leaf), source in self._carried.items():
                read = self._read(("", source), block, rows) if number == block else ()
                if read:
                    leaves[leaf] = read[0]
            for (number, leaf), kept in self._varying.items():
                if number == block:
                    leaves[leaf] = kept.read(rows, self._device)
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


class _Kept:
    """An argument that depends on the tokens, of all N sequences, whose axis in it is `axis`."""

    def __init__(self, count: int, axis: int, store: Store) -> None:
        self._count, self._axis, self._store = count, axis, store
        self._values: Tensor | None = None

    def keep(self, part: slice, value: Tensor) -> None:
        """Keep it for some sequences."""
        value = value.detach().movedim(self._axis, 0)
        if self._values is None:
            self._values = self._store((self._count, *value.shape[1:]), value.dtype)
        self._values[part] = value

    def read(self, rows: Rows, device: torch.device) -> Tensor:
        """It for some sequences."""
        assert self._values is not None
        return self._values[rows].to(device).movedim(0, self._axis)


def _leaves(call: Call | None) -> list[Any]:
    """The values in the arguments of a block; none where it does not run."""
    return [] if call is None else tree_flatten(call)[0]


def _of_all_together() -> ValueError:
    return ValueError(
        "the blocks of this model get arguments that depend on the tokens of all sequences together; "
        "this architecture is not supported"
    )


def _near(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are equal up to rounding: rotary tables may differ in the last bit."""
    if x.shape != y.shape or x.dtype != y.dtype or not x.is_floating_point():
        return torch.equal(x, y)
    return torch.allclose(x.float(), y.float(), rtol=1e-2, atol=1e-2)
