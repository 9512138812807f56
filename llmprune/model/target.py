"""One prunable matrix of a model, as [R, C] (out_features, in_features) however it is stored.

"As stored" means in the layout of the checkpoint, which is [C, R] for `Conv1D` and for some experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llmprune.checkpoint.packed import Packed
from llmprune.model.conversion import Piece


@dataclass(frozen=True, eq=False)
class Target:
    """One prunable matrix: where it is stored, and where the model has it.

    Attributes:
        name: of its module, or of the stored matrix where it is no module's own.
        key: its name in the record and among the masks: the tensor's, for a stack with the matrix's number.
        tensor: the name of the tensor in the checkpoint.
        index: which matrix of the tensor, where that stacks several; else None.
        transposed: whether it is stored as [C, R].
        shape: (R, C).
        pieces: where its rows are in the parameters of the model.
        owners: for each of those parameters its module and its name there.
        turned: the parameters that hold their matrices as [C, R].
        module: a linear layer whose weight is this matrix and nothing else; None for others.
        routed: whether it belongs to an expert, which sees only some of the tokens.
    """

    name: str
    key: str
    tensor: str
    index: int | None
    transposed: bool
    shape: tuple[int, int]
    pieces: tuple[Piece, ...]
    owners: Mapping[str, tuple[nn.Module, str]] = field(repr=False)
    turned: frozenset[str] = frozenset()
    module: nn.Module | None = field(default=None, repr=False)
    routed: bool = False

    @property
    def weight_name(self) -> str:
        """The name of its weight, by which everything random about it is seeded."""
        return f"{self.name}.weight"

    @property
    def expert(self) -> int | None:
        """Which matrix of a stacked parameter holds its first rows; None where it is in no stack."""
        return self.pieces[0].expert

    @property
    def layer(self) -> nn.Module | None:
        """The linear layer that computes with it or its first rows; None where it is in a stack."""
        return None if self.expert is not None else self.owners[self.parameter][0]

    @property
    def place(self) -> tuple[str, int | None]:
        """The parameter that holds its first rows, and which matrix of that parameter."""
        return self.parameter, self.expert

    @property
    def parameter(self) -> str:
        """The name of the first parameter that holds rows of it."""
        return self.pieces[0].parameter

    def loaded(self, parameter: str | None = None) -> Tensor:
        """A parameter that holds rows of it, the first one if none is named."""
        owner, leaf = self.owners[parameter or self.parameter]
        return owner._parameters[leaf].detach()  # type: ignore[union-attr]

    def _matrix(self, loaded: Tensor, piece: Piece) -> Tensor:
        """The matrix of a loaded parameter that holds a piece, [rows, C]."""
        matrix = loaded if piece.expert is None else loaded[piece.expert]
        return matrix.T if piece.parameter in self.turned else matrix

    def _place(self, loaded: Tensor, piece: Piece) -> Tensor:
        """The rows of a piece in a loaded parameter, a view [n, C] where `rows` is a slice."""
        return self._matrix(loaded, piece)[piece.rows]

    def grouped(self, parameter: str, shape: torch.Size, group: int) -> list[int]:
        """The shape of a parameter with one entry for so many columns of its matrices."""
        columns = -2 if parameter in self.turned else -1
        sizes = list(shape)
        sizes[columns] = -(-sizes[columns] // group)
        return sizes

    def gather(self, parameters: Mapping[str, Tensor], group: int = 1) -> Tensor:
        """The matrix [R, C] from the parameters that hold it, by name.

        `group`: of so many columns the parameters have one entry, see `grouped`; [R, ceil(C / group)].
        """
        first = self.pieces[0]
        if len(self.pieces) == 1 and first.stored == slice(0, self.shape[0]):
            return self._place(parameters[first.parameter], first)
        whole = parameters[first.parameter].new_empty(self.shape[0], -(-self.shape[1] // group))
        for piece in self.pieces:
            whole[piece.stored] = self._place(parameters[piece.parameter], piece)
        return whole

    def scatter(self, weight: Tensor, parameters: Mapping[str, Tensor]) -> None:
        """Write a matrix [R, C] into the parameters that hold it, in place."""
        for piece in self.pieces:
            matrix = self._matrix(parameters[piece.parameter], piece)
            matrix[piece.rows] = weight[piece.stored].to(matrix.device, matrix.dtype)

    @property
    def device(self) -> torch.device:
        """Where the model has it."""
        return self.loaded().device

    def part(self, stored: Tensor) -> Tensor:
        """The matrix as stored, a view of its tensor."""
        return stored if self.index is None else stored[self.index]

    def oriented(self, part: Tensor) -> Tensor:
        """A [R, C] view of a matrix as stored."""
        return part.T if self.transposed else part

    def read(self, stored: Tensor) -> Tensor:
        """The weight as [R, C] in float32 on the model's device; a copy only if necessary.

        `stored` is its tensor from the checkpoint. It is used if the model's weight is not float32, since
        then it may have been rounded when it was loaded.
        """
        loaded = self.loaded()
        if loaded.dtype == torch.float32 and self.module is not None:
            return self._place(loaded, self.pieces[0]).contiguous()
        return self.view(stored)

    def view(self, stored: Tensor) -> Tensor:
        """The matrix of a stored tensor as [R, C] in float32, on the model's device."""
        return self.oriented(self.part(stored)).to(self.device, torch.float32).contiguous()

    def stored(self, weight: Tensor) -> Tensor:
        """A weight [R, C] in the layout in which it is stored."""
        return (weight.T if self.transposed else weight).contiguous()

    def shared(self, stored: Tensor) -> Tensor | None:
        """The tensor of the checkpoint as a view of the parameter that was made from it, to hold it once.

        None where that is not possible: it is converted in another way, or has another dtype or device.
        """
        first = self.pieces[0]
        loaded = self.loaded()
        alike = loaded.dtype == stored.dtype and loaded.device == stored.device
        if first.expert is None or self.index is not None or len(self.pieces) > 1 or not alike:
            return None
        view = self._place(loaded, first)
        view = view.T if self.transposed else view
        return view if view.is_contiguous() and view.data_ptr() != stored.data_ptr() else None

    @torch.no_grad()
    def assign(self, part: Tensor) -> None:
        """Put a matrix as stored into the model, on its device and in its dtype.

        A parameter that is this matrix alone is replaced, any other is written to.
        """
        if self.module is not None:
            old: Tensor = self.module.weight  # type: ignore[assignment]
            self.module.weight = nn.Parameter(part.to(old.device, old.dtype), requires_grad=False)
        else:
            self.scatter(self.oriented(part), {name: self.loaded(name) for name in self.owners})


def bits_of(source: Packed, target: Target) -> Tensor:
    """The mask of a matrix that is packed, as the bits of `masks.safetensors`, uint8 [R, ceil(C / 8)]."""
    rows, columns = target.shape
    first = (target.index or 0) * rows
    return source.load_mask(target.tensor)[first : first + rows, : -(-columns // 8)].contiguous()


def by_expert(targets: Iterable[Target]) -> list[list[Target]]:
    """The matrices of each expert; those that belong to none are left out."""
    experts: dict[object, list[Target]] = {}
    for target in targets:
        if target.routed:
            place = target.name if target.expert is None else target.parameter
            experts.setdefault((place.rpartition(".")[0], target.expert), []).append(target)
    return list(experts.values())
