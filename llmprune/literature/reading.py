"""Reads a file of published figures strictly: an unknown key, a missing source or a figure twice is an error.

A file mirrors the tables of one paper (`eval/published/`, described in `docs/published.md`). Its `protocol`
and `source` hold for all its tables; a table names what is different in it.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprune.common.messages import nearest, shown
from llmprune.common.shipped import read_yaml
from llmprune.literature.figure import SEEN_IN, UNSTRUCTURED, WHOLE, Figure, Protocol, Source


def read_figures(path: Path) -> tuple[Figure, ...]:
    """The figures of a file, in its order.

    Raises:
        ValueError: the file is not of the form described in `docs/published.md`; the message names the place.
    """
    file = _Part(read_yaml(path), path.name)
    file.keys(("paper", "methods", "protocol", "source", "tables"))
    paper = file.part("paper")
    paper.keys(("name", "title", "url"))
    named = {"paper": paper.take("name", _text), "title": paper.take("title", _text)}
    paper.take("url", _address)
    methods = {key: _text(text, f"{path.name}: methods: {key}") for key, text in file.part("methods").items()}
    tables = file.take("tables", _list)
    found: list[Figure] = []
    for number, table in enumerate(tables, 1):
        part = _Part(table, f"{path.name}, table {number}")
        given = ("protocol", "source")
        defaults = {key: dict(file.part(key).items()) for key in given}
        found += _figures(part, methods, defaults, named)
    unused = sorted(set(methods) - {figure.method for figure in found})
    if unused:
        raise ValueError(f"{path.name}: no figure of method {unused[0]!r}; leave it out of methods")
    refuse_twice(found)
    return tuple(found)


def refuse_twice(figures: list[Figure]) -> None:
    """Raise `ValueError` where two entries are the same figure."""
    known: dict[tuple[object, ...], Figure] = {}
    for figure in figures:
        before = known.setdefault(figure.key, figure)
        if before is not figure:
            raise ValueError(
                f"{figure.source.paper}: {figure.method} on {figure.model}, {figure.pattern} "
                f"{figure.sparsity:g}, {figure.metric} {', '.join(figure.on)} stands twice "
                f"({before.source.where} and {figure.source.where}); keep one"
            )


def _figures(
    table: _Part, methods: Mapping[str, str], defaults: Mapping[str, dict[str, Any]], paper: Mapping[str, str]
) -> Iterator[Figure]:
    """The figures of one table."""
    table.keys(("values",), ("protocol", "source", "pattern", "sparsity", "columns", "dense"))
    protocol = _protocol(_Part(defaults["protocol"] | dict(table.part("protocol", {}).items()), table.name))
    source = _source(_Part(defaults["source"] | dict(table.part("source", {}).items()), table.name), paper)
    pattern, sparsity = _pattern(table)
    columns = [_column(_Part(column, f"{table.name}: columns")) for column in table.take("columns", _list)]
    dense = table.part("dense", {})
    values = table.part("values")
    for model in dense:
        if model not in values:
            raise ValueError(f"{dense.name}: {model} has no values; leave it out")
    for model in values:
        _hub_id(model, values.name)
        before = _cells(dense.get(model, [None] * len(columns)), columns, f"{dense.name}: {model}")
        rows = values.part(model)
        for method in rows:
            if method not in methods:
                raise nearest(f"method in {rows.name}", method, methods)
            cells = _cells(rows.get(method), columns, f"{rows.name}: {method}")
            for column, value, other in zip(columns, cells, before, strict=True):
                if value is not None:
                    yield Figure(
                        model=model,
                        method=method,
                        about=methods[method],
                        pattern=pattern,
                        sparsity=sparsity,
                        metric=column.metric,
                        on=column.on,
                        value=value,
                        dense=other,
                        protocol=column.of(protocol),
                        source=source,
                    )


@dataclass(frozen=True)
class _Column:
    metric: str
    on: tuple[str, ...]
    windows: int | str | None
    shots: int | None

    def of(self, protocol: Protocol) -> Protocol:
        """The table's protocol for this column: without the window where no perplexity is measured."""
        window = protocol.window if self.metric == "perplexity" else None
        return dataclasses.replace(protocol, window=window, windows=self.windows, shots=self.shots)


def _column(part: _Part) -> _Column:
    if "perplexity" in part:
        part.keys(("perplexity",), ("windows",))
        windows = part.take("windows", _windows, None)
        return _Column("perplexity", (part.take("perplexity", _text),), windows, None)
    part.keys(("accuracy", "shots"))
    tasks = tuple(_text(task, part.name) for task in part.take("accuracy", _list))
    return _Column("accuracy", tasks, None, part.take("shots", _count))


def _protocol(part: _Part) -> Protocol:
    checks: dict[str, Check] = {key: _count for key in ("window", "samples", "length")}
    checks |= {key: _text for key in ("calibration", "trained", "note")}
    part.keys((), tuple(checks))
    return Protocol(**{key: part.take(key, check, None) for key, check in checks.items()})


def _source(part: _Part, paper: Mapping[str, str]) -> Source:
    checks: dict[str, Check] = {"where": _text, "url": _address, "via": _via, "seen": _day}
    part.keys(tuple(checks))
    return Source(**paper, **{key: part.take(key, check) for key, check in checks.items()})


def _pattern(table: _Part) -> tuple[str, float]:
    """Pattern and sparsity; an N:M pattern has its sparsity in itself."""
    pattern = table.take("pattern", _text)
    found = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", pattern)
    if found is None and pattern != UNSTRUCTURED:
        raise ValueError(
            f"{table.name}: pattern must be {UNSTRUCTURED} or N:M in quotes, got {shown(pattern)}"
        )
    if found is None:
        return pattern, table.take("sparsity", _share)
    kept, of = int(found[1]), int(found[2])
    if "sparsity" in table or kept >= of:
        raise ValueError(
            f"{table.name}: pattern {pattern} keeps {kept} of {of}; leave sparsity out, keep fewer"
        )
    return pattern, 1 - kept / of


def _cells(value: Any, columns: list[_Column], place: str) -> list[float | None]:
    """A number for each column; for one column it may stand alone, and null is a cell that was not seen."""
    cells = value if isinstance(value, list) else [value]
    if len(cells) != len(columns):
        raise ValueError(f"{place}: needs {len(columns)} values, got {shown(value)}")
    return [None if cell is None else _value(cell, place) for cell in cells]


class _Part:
    """A mapping of the file, with its place in words for messages."""

    def __init__(self, values: Any, name: str) -> None:
        if not isinstance(values, dict):
            raise ValueError(f"{name} must be a mapping, got {shown(values)}")
        self._values, self.name = values, name

    def keys(self, needed: tuple[str, ...], allowed: tuple[str, ...] = ()) -> None:
        for key in self._values:
            if key not in (*needed, *allowed):
                raise nearest(f"key in {self.name}", key, (*needed, *allowed))
        missing = [key for key in needed if key not in self._values]
        if missing:
            raise ValueError(f"{self.name}: {missing[0]} is missing; a figure without it is not entered")

    def part(self, key: str, default: Any = ...) -> _Part:
        return _Part(self.take(key, lambda value, place: value, default), f"{self.name}: {key}")

    def take(self, key: str, check: Check, default: Any = ...) -> Any:
        value = self._values.get(key, default)
        if value is ...:
            raise ValueError(f"{self.name}: {key} is missing; a figure without it is not entered")
        return value if value is default or value is None is default else check(value, f"{self.name}: {key}")

    def get(self, key: str, default: Any = None) -> Any:
        return self._values.get(key, default)

    def items(self) -> Any:
        return self._values.items()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values


Check = Callable[[Any, str], Any]


def _wrong(place: str, wanted: str, value: Any) -> ValueError:
    return ValueError(f"{place} must be {wanted}, got {shown(value)}")


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _wrong(place, "text", value)
    return value


def _list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise _wrong(place, "a list", value)
    return value


def _count(value: Any, place: str) -> int:
    if type(value) is not int or value < 0:
        raise _wrong(place, "a whole number", value)
    return value


def _windows(value: Any, place: str) -> int | str:
    return WHOLE if value == WHOLE else _count(value, place)


def _value(value: Any, place: str) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
        raise _wrong(place, "a number above 0", value)
    return float(value)


def _share(value: Any, place: str) -> float:
    if not _value(value, place) < 1:
        raise _wrong(place, "a share between 0 and 1", value)
    return float(value)


def _address(value: Any, place: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"https://[^\s/]+/\S+", value):
        raise _wrong(place, "an address that begins with https://", value)
    return value


def _hub_id(value: Any, place: str) -> None:
    if not isinstance(value, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", value, re.ASCII):
        raise _wrong(place, "models by their hub ids (owner/name)", value)


def _via(value: Any, place: str) -> str:
    if value not in SEEN_IN:
        raise nearest(f"kind of source in {place}", value, SEEN_IN)
    return str(value)


def _day(value: Any, place: str) -> str:
    if type(value) is not datetime.date:
        raise _wrong(place, "a day (YYYY-MM-DD)", value)
    return value.isoformat()
