"""Sorts the matrices of a record by block and kind, for maps, plots and tables.

The matrices of experts of one kind in one block are one group: there may be hundreds of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]
_ANY = "*"  # in the place of an expert's number


class Group(NamedTuple):
    """The matrices of one kind in one block.

    Attributes:
        name: of the matrix; of several with `*` for the number of the expert.
        matrices: their entries in the record.
    """

    name: str
    matrices: Sequence[Row]

    @property
    def sparsity(self) -> float:
        """The share of zeros over all of them."""
        sizes = [row["shape"][0] * row["shape"][1] for row in self.matrices]
        zeros = sum(size * row["sparsity"] for size, row in zip(sizes, self.matrices, strict=True))
        return float(zeros / sum(sizes))

    @property
    def errors(self) -> list[float]:
        """The relative errors, of those that have one."""
        return [row["relative_error"] for row in self.matrices if row["relative_error"] is not None]

    @property
    def error(self) -> float | None:
        """The mean of the relative errors; None where none has one."""
        return sum(self.errors) / len(self.errors) if self.errors else None


class Grid(NamedTuple):
    """All matrices by block and kind.

    Attributes:
        blocks: the names of the blocks, in their order.
        kinds: the names of the kinds, in their order.
        groups: by block and kind.
    """

    blocks: Sequence[str]
    kinds: Sequence[str]
    groups: Mapping[tuple[str, str], Group]

    @property
    def largest(self) -> int:
        """The most matrices in a group; 1 where nothing is grouped."""
        return max((len(group.matrices) for group in self.groups.values()), default=0)


def grid_of(matrices: Sequence[Row]) -> Grid:
    """The matrices of a record by block and kind."""
    places = [_place(row["name"]) for row in matrices]
    several = len({place.above for place in places if place.number is not None}) > 1
    names = _short({place.kind: None for place in places})
    groups: dict[tuple[str, str], tuple[str, list[Row]]] = {}
    for place, row in zip(places, matrices, strict=True):
        key = _block(place, several), names[place.kind]
        groups.setdefault(key, (place.name, []))[1].append(row)
    found = {
        key: Group(str(rows[0]["name"]) if len(rows) == 1 else name, rows)
        for key, (name, rows) in groups.items()
    }
    blocks, kinds = (list(dict.fromkeys(key[n] for key in found)) for n in (0, 1))
    return Grid(blocks, kinds, found)


class _Place(NamedTuple):
    """Where a matrix is: the list of its block, the block's number in it, its kind, its name without an
    expert's number.
    """

    above: str
    number: int | None
    kind: tuple[str, ...]
    name: str


def _place(name: str) -> _Place:
    parts = name.split(".")
    at = next((n for n, part in enumerate(parts) if part.isdigit()), None)
    if at is None:
        return _Place("", None, tuple(p for p in parts if p != "weight"), name)
    inner = [_ANY if part.isdigit() else part for part in parts[at + 1 :]]
    kind = tuple(part for part in inner if part != "weight")
    return _Place(".".join(parts[:at]), int(parts[at]), kind, ".".join([*parts[: at + 1], *inner]))


def _block(place: _Place, several: bool) -> str:
    """The name of a block: its number, after the name of its list where there are several; `-` outside."""
    if place.number is None:
        return "-"
    return f"{place.above} {place.number}" if several else str(place.number)


def _short(kinds: Mapping[tuple[str, ...], None]) -> dict[tuple[str, ...], str]:
    """For each kind the shortest end of its path that no other has; of experts at least two parts."""
    plain = {kind: [part for part in kind if part != _ANY] for kind in kinds}
    longest = max((len(parts) for parts in plain.values()), default=1)

    def end(kind: tuple[str, ...], length: int) -> str:
        return ".".join(plain[kind][-length:])

    found = {}
    for kind in kinds:
        least = 2 if _ANY in kind else 1
        others = [other for other in kinds if other != kind]
        length = next(
            (n for n in range(least, longest + 1) if all(end(kind, n) != end(o, n) for o in others)), longest
        )
        found[kind] = end(kind, length)
    return found
