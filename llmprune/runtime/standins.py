"""Stand-ins for dense weights whose matrices stay packed: they unpack where a model computes with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from llmprune.checkpoint.packed_tensor import Layout
from llmprune.kernels.layout import byte_rows, row_entries
from llmprune.kernels.packing import expand


class Rows(NamedTuple):
    """Some rows of a packed tensor, and where they stand in a matrix of the stack.

    Attributes:
        parts: of the packed tensor, by what is added to its name. layout: of it.
        starts: where the values of its rows begin, see `starts_of`.
        start, stop: which of its rows.
        place: which rows of the matrix they are.
    """

    parts: Mapping[str, Tensor]
    layout: Layout
    starts: Tensor
    start: int
    stop: int
    place: slice | Tensor

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The rows [n, C]."""
        first, last = int(self.starts[self.start]), int(self.starts[self.stop])
        mask, scale = self.parts.get("_mask"), self.parts.get("_scale")
        return expand(
            self.parts[""][first:last],
            None if mask is None else mask[self.start : self.stop],
            (self.stop - self.start, self.layout.columns),
            dtype,
            None if scale is None else scale[self.start : self.stop],
        )


def starts_of(parts: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """Where the values of each row begin: with 4 bits in bytes, which the number of values does not tell."""
    if layout.whole:
        return torch.arange(layout.rows + 1) * row_entries(layout.columns, layout.bits)
    return byte_rows(parts["_mask"], layout.columns) if layout.bits == 4 else parts["_rows"]


class Standin:
    """Stands for a dense weight: whatever torch computes with it, it computes with the unpacked weight.

    Args:
        shape, dtype: of the dense weight.
        dense: unpacks it; the result is not kept.
        device: where the packed parts are; None for the CPU.
    """

    def __init__(
        self,
        shape: torch.Size,
        dtype: torch.dtype,
        dense: Callable[[], Tensor],
        device: torch.device | None = None,
    ) -> None:
        self.shape, self.dtype, self.dense = shape, dtype, dense
        self.device = device or torch.device("cpu")

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        args, kwargs = tree_map(_dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Tensor:
        return self.dense()[index]

    def __matmul__(self, other: Tensor) -> Tensor:
        return self.dense() @ other

    def __rmatmul__(self, other: Tensor) -> Tensor:
        return other @ self.dense()


def follow(owner: nn.Module) -> None:
    """Let the stacks of a module move with it, as its parameters do."""
    owner._apply = MethodType(_apply, owner)  # type: ignore[method-assign]


def _apply(owner: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    type(owner)._apply(owner, fn, recurse)
    move_stacks(owner, fn(torch.empty(0, dtype=torch.uint8)).device)
    return owner


def device_near(model: nn.Module, name: str) -> torch.device:
    """The device of what lies nearest to a parameter that was taken away from the model."""
    while name:
        name = name.rpartition(".")[0]
        near = model.get_submodule(name)
        for tensor in (*near.parameters(), *near.buffers()):
            if not tensor.is_meta:
                return tensor.device
    return torch.device("cpu")


def move_stacks(owner: nn.Module, device: torch.device) -> None:
    """Move the stacks of one module to a device."""
    moved: dict[int, dict[str, Tensor]] = {}
    for stack in vars(owner).values():
        if isinstance(stack, PackedStack) and stack.device != device:
            stack.move(device, moved)


def _dense(leaf: Any) -> Any:
    return leaf.dense() if isinstance(leaf, Standin) else leaf


class PackedStack(Standin):
    """Stands for a parameter that stacks matrices; `stack[e]` is matrix e, unpacked at that moment.

    Args:
        shape: of the parameter.
        dtype: of the unpacked matrices.
        matrices: for each matrix the rows it is made of.
        turned: whether the parameter holds its matrices as [C, R].
    """

    def __init__(
        self, shape: torch.Size, dtype: torch.dtype, matrices: Sequence[Sequence[Rows]], turned: bool
    ) -> None:
        super().__init__(shape, dtype, lambda: torch.stack([self.matrix(n) for n in range(len(self))]))
        self._matrices, self._turned = matrices, turned

    def __getitem__(self, index: Any) -> Tensor:
        one = isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0)
        return self.matrix(int(index)) if one else self.dense()[index]

    def matrix(self, number: int) -> Tensor:
        """One matrix, as the parameter holds it."""
        pieces = self._matrices[number]
        if len(pieces) == 1:
            matrix = pieces[0].dense(self.dtype)
        else:
            size = self.shape[1:][::-1] if self._turned else self.shape[1:]
            matrix = torch.empty(size, dtype=self.dtype, device=self.device)
            for piece in pieces:
                matrix[piece.place] = piece.dense(self.dtype)
        return matrix.T if self._turned else matrix

    def move(self, device: torch.device, moved: dict[int, dict[str, Tensor]]) -> None:
        """Move the packed parts; `moved` has those that other stacks have moved already, by `id`."""
        for pieces in self._matrices:
            for piece in pieces:
                if id(piece.parts) not in moved:
                    moved[id(piece.parts)] = {part: t.to(device) for part, t in piece.parts.items()}
        self._matrices = [
            [piece._replace(parts=moved[id(piece.parts)]) for piece in pieces] for pieces in self._matrices
        ]
        self.device = device

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.bmm and len(args) == 2 and isinstance(args[1], cls):  # one matrix at a time
            inputs, stack = args
            return torch.stack([inputs[number] @ stack[number] for number in range(len(stack))])
        return super().__torch_function__(func, types, args, kwargs)
