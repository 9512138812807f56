"""How the parameters of a model are made from the tensors of its checkpoint.

While it loads, transformers renames, merges, splits and transposes tensors (its conversion mapping, since
version 5), so names and shapes in the files may not be those of the modules. This file is the one place that
knows that mapping. Where a version of transformers has none, the plain names serve.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmprune.common.messages import first_line


@dataclass(frozen=True, eq=False)
class Group:
    """Parameters (or stored buffers) that are made together.

    Attributes:
        parameters: their names in the model.
        tensors: what they are made from, by name in the checkpoint.
        patterns: for each tensor, the pattern of the converter that it matches.
        converter: of transformers; None where the one tensor is the one parameter as it is.
    """

    parameters: tuple[str, ...]
    tensors: tuple[str, ...]
    patterns: tuple[str, ...] = ()
    converter: Any = None

    def make(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters, from tensors by name in the checkpoint; not copied where nothing is converted.

        Raises:
            ValueError: the converter fails, or makes other parameters than expected.
        """
        if self.converter is None:
            return {self.parameters[0]: tensors[self.tensors[0]]}
        converter = copy.deepcopy(self.converter)
        first = self.parameters[0]
        for name, pattern in zip(self.tensors, self.patterns, strict=True):
            converter.add_tensor(first, name, pattern, tensors[name])
        try:
            made = converter.convert(first, model=model, config=model.config)
            made = made[0] if isinstance(made, tuple) else made  # with errors beside, before 5.1
        except Exception as error:  # of any type, depending on the operation
            raise ValueError(
                f"transformers cannot make {first!r} from {self.tensors[0]!r} "
                f"({type(error).__name__}: {first_line(error)}); the checkpoint is incomplete or damaged"
            ) from error
        result = {name: t[0] if isinstance(t, list) else t for name, t in made.items()}
        if set(result) != set(self.parameters):
            raise ValueError(
                f"transformers makes {sorted(result)[0]!r} from {self.tensors[0]!r}, "
                f"where {first!r} was expected; the checkpoint is incomplete or damaged"
            )
        return result


def groups_of(model: nn.Module, names: Iterable[str]) -> list[Group]:
    """How the parameters of a model are made from the tensors with these names.

    Tensors that transformers would not use are in no group; parameters that it would find missing neither.
    """
    wanted = {name: None for name in model.state_dict()}
    prefix = getattr(model, "base_model_prefix", "")
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError:
        return _plain_groups(wanted, prefix, names)
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    # `rename_source_key` looks parameters up by `get(...) is not None`.
    known: dict[str, Any] = dict.fromkeys(wanted, True)
    found: dict[str, list[tuple[str, str | None]]] = {}
    for name in sorted(names, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if renamed not in wanted and name in wanted:
            renamed, pattern = rename_source_key(name, [], [], prefix, known)
        if renamed in wanted:
            found.setdefault(renamed, []).append((name, pattern))
    groups = []
    for parameter, tensors in found.items():
        converted = [(name, pattern) for name, pattern in tensors if pattern is not None]
        if converted:
            converter = by_pattern[converted[0][1]]
            made = _made(converter, parameter, wanted)
            group = Group(
                made, tuple(name for name, _ in converted), tuple(str(p) for _, p in converted), converter
            )
        else:
            group = Group((parameter,), (tensors[0][0],))
        groups.append(group)
    return groups


def renamed(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """What transformers calls some tensors of the files after its renamings, before anything is converted."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:
        return {name: name for name in names}
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    prefix, known = getattr(model, "base_model_prefix", ""), dict.fromkeys(model.state_dict(), True)
    return {name: rename_source_key(name, renamings, [], prefix, known)[0] for name in names}


def _made(converter: Any, parameter: str, wanted: Mapping[str, Any]) -> tuple[str, ...]:
    """All parameters that a converter makes together with the one that its first target names."""
    targets = converter.target_patterns
    if len(targets) == 1:
        return (parameter,)
    first = next((t for t in (targets[0], targets[0].replace("\\", "")) if t in parameter), None)
    if first is None:
        return (parameter,)
    names = [parameter.replace(first, t if t in targets[:1] else t.replace("\\", "")) for t in targets]
    return tuple(name for name in names if name in wanted) or (parameter,)


def _plain_groups(wanted: Mapping[str, Any], prefix: str, names: Iterable[str]) -> list[Group]:
    """As `groups_of`, where names differ at most by the prefix of the base model."""
    groups = []
    for name in names:
        candidates = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
        found = next((c for c in candidates if c in wanted), None)
        if found is not None:
            groups.append(Group((found,), (name,)))
    return groups


class Piece(NamedTuple):
    """Some rows of a stored matrix [R, C] in a parameter.

    Attributes:
        parameter: its name in the model.
        expert: which matrix of a parameter that stacks several; None where the parameter is one matrix.
        rows: which rows of that matrix, oriented as [out_features, in_features].
        stored: which rows of the stored matrix they are, oriented likewise.
    """

    parameter: str
    expert: int | None
    rows: slice | Tensor
    stored: slice | Tensor

    @property
    def height(self) -> int:
        """How many rows."""
        return self.rows.stop - self.rows.start if isinstance(self.rows, slice) else len(self.rows)


class Stored(NamedTuple):
    """A matrix in the checkpoint.

    Attributes:
        tensor: its name. number: which matrix of a tensor that stacks several, else None.
        transposed: whether it is stored as [C, R].
        shape: (R, C).
        pieces: where its rows are in the model.
    """

    tensor: str
    number: int | None
    transposed: bool
    shape: tuple[int, int]
    pieces: tuple[Piece, ...]


@dataclass
class _Traced:
    """What is known of a stored matrix while it is traced: some pieces with C columns each."""

    transposed: bool
    columns: int
    pieces: list[Piece] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return sum(piece.height for piece in self.pieces)


class Tracer:
    """Finds out where the entries of stored matrices end up, by converting coordinates instead of weights."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known: dict[
            Any, tuple[Group, list[Stored]]
        ] = {}  # groups that are converted alike: one of them

    def matrices(
        self,
        group: Group,
        shapes: Mapping[str, tuple[int, ...]],
        transposed: Mapping[str, bool],
    ) -> list[Stored]:
        """The stored matrices of a group that is converted.

        Args:
            shapes: of its tensors, by name.
            transposed: for each parameter that takes part in matrix products, whether it is used as [C, R].

        Returns:
            Only matrices all of whose rows are rows of such parameters.
        """
        made = [name for name in group.parameters if name in transposed]
        if not made:
            return []
        key = (
            id(group.converter),
            group.patterns,
            tuple(shapes[name] for name in group.tensors),
            tuple((group.parameters.index(name), transposed[name]) for name in made),
        )
        if key not in self._known:
            self._known[key] = group, self._trace(group, shapes, {name: transposed[name] for name in made})
        like, found = self._known[key]
        names = dict(zip(like.parameters, group.parameters, strict=True))
        return [
            stored._replace(
                tensor=group.tensors[like.tensors.index(stored.tensor)],
                pieces=tuple(piece._replace(parameter=names[piece.parameter]) for piece in stored.pieces),
            )
            for stored in found
        ]

    def _trace(
        self, group: Group, shapes: Mapping[str, tuple[int, ...]], transposed: Mapping[str, bool]
    ) -> list[Stored]:
        sizes = [shapes[name] for name in group.tensors]
        axes = max(map(len, sizes))
        if axes not in (2, 3) or any(len(size) != axes for size in sizes):
            return []
        which = self._convert(group, [_filled(size, None, n) for n, size in enumerate(sizes)])
        coordinates = [
            self._convert(group, [_filled(size, axis, 0) for size in sizes]) for axis in range(axes)
        ]
        found: dict[tuple[int, int | None], _Traced] = {}
        for parameter, turned in transposed.items():
            here = which[parameter]
            for expert in range(len(here)) if here.ndim == 3 else (None,):
                pick = functools.partial(_matrix, expert=expert, transposed=turned)
                place = parameter, expert
                self._collect(found, place, pick(here), [pick(c[parameter]) for c in coordinates])
        matrices = []
        for (number, index), traced in found.items():
            a, b = sizes[number][-2:]
            shape = (b, a) if traced.transposed else (a, b)
            # Only where the pieces make the whole matrix.
            if shape == (traced.rows, traced.columns):
                pieces = tuple(traced.pieces)
                matrices.append(Stored(group.tensors[number], index, traced.transposed, shape, pieces))
        return matrices

    def _convert(self, group: Group, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        return group.make(self._model, dict(zip(group.tensors, tensors, strict=True)))

    @staticmethod
    def _collect(
        found: dict[tuple[int, int | None], _Traced],
        place: tuple[str, int | None],
        which: Tensor,
        coordinates: list[Tensor],
    ) -> None:
        """Take in one matrix [R, C] of the model: which tensor and coordinates each entry comes from."""
        columns = torch.arange(which.shape[1], dtype=which.dtype)
        along = [bool((c == columns).all()) for c in coordinates[-2:]]
        if sum(along) != 1 and which.shape[1] > 1:
            return
        turned = along[0] and not along[1]
        if bool((which != which[:, :1]).any()):
            return
        row = coordinates[-1] if turned else coordinates[-2]
        indices = coordinates[0] if len(coordinates) == 3 else None
        if any(bool((c != c[:, :1]).any()) for c in (row, indices) if c is not None):
            return
        numbers = which[:, 0].long()
        stacks = indices[:, 0].long() if indices is not None else torch.full_like(numbers, -1)
        for number, index in dict.fromkeys(zip(numbers.tolist(), stacks.tolist(), strict=True)):
            rows = ((numbers == number) & (stacks == index)).nonzero()[:, 0]
            key = (number, None if index < 0 else index)
            entry = found.setdefault(key, _Traced(turned, which.shape[1]))
            if (entry.transposed, entry.columns) == (turned, which.shape[1]):
                entry.pieces.append(Piece(*place, _as_slice(rows), _as_slice(row[rows, 0].long())))


def _filled(size: tuple[int, ...], axis: int | None, value: int) -> Tensor:
    """A tensor of coordinates along an axis, or of one value; its memory is that of one row."""
    kind = torch.int16 if max(*size, value) < 1 << 15 else torch.int32
    if axis is None:
        return torch.tensor(value, dtype=kind).expand(size)
    shape = [1] * len(size)
    shape[axis] = size[axis]
    return torch.arange(size[axis], dtype=kind).view(shape).expand(size)


def _matrix(parameter: Tensor, expert: int | None, transposed: bool) -> Tensor:
    """One matrix of a parameter as [R, C]."""
    matrix = parameter if expert is None else parameter[expert]
    return matrix.T if transposed else matrix


def _as_slice(rows: Tensor) -> slice | Tensor:
    """A slice where rows follow one another, else the rows."""
    start = int(rows[0])
    if bool((rows == torch.arange(start, start + len(rows))).all()):
        return slice(start, start + len(rows))
    return rows


def tied_names(model: nn.Module) -> dict[str, str]:
    """Parameter -> the parameter whose weight it shares, as far as the config ties them."""
    tied = getattr(model, "all_tied_weights_keys", None)
    if isinstance(tied, dict):
        return dict(tied)
    keys = getattr(model, "_tied_weights_keys", None)
    config: Any = model.config
    if not isinstance(keys, dict) or not getattr(config, "tie_word_embeddings", False):
        return {}
    return dict(keys)


def dtypes_of(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype in which transformers keeps each parameter when it loads the model in `dtype`.

    Some stay in float32: what a class asks for, and parameters that it makes so.
    """
    plan: dict[str, torch.dtype] = {}
    if hasattr(model, "_get_dtype_plan"):
        plan = model._get_dtype_plan(dtype)  # type: ignore[operator]
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        planned = (kept for pattern, kept in plan.items() if re.search(pattern.replace("*", ".*"), name))
        found[name] = next(planned, parameter.dtype)
    return found
