"""Finds and builds algorithms by name.

An algorithm's name is the name of its file in `pruners/`, `refiners/`, `updates/` or `allocators/` (the
"room"), or in one of the rooms of `recovery/`, with `-` for `_`. There is no list to edit.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import pkgutil
from collections.abc import Mapping
from typing import Any, get_origin, get_type_hints

from llmprune.common.messages import nearest, shown
from llmprune.contracts import Algorithm

ROOMS = ("pruners", "refiners", "updates", "allocators")
RECOVERY_ROOMS = ("recovery.schedules", "recovery.rules", "recovery.trainables", "recovery.objectives")


def kind_of(room: str) -> str:
    """What an algorithm of a room is called."""
    return room.rpartition(".")[2].removesuffix("s")


def names(room: str) -> list[str]:
    """The names of a room's algorithms, sorted; their files are not imported."""
    package = importlib.import_module(f"llmprune.{room}")
    files = [module.name for module in pkgutil.iter_modules(package.__path__)]
    return sorted(file.replace("_", "-") for file in files if not file.startswith("_"))


def find(room: str, name: str) -> type[Algorithm]:
    """The class of an algorithm.

    Raises:
        ValueError: no such algorithm, with the names most like it. An import error inside its file is passed
            on unchanged.
    """
    if name not in names(room):
        raise nearest(kind_of(room), name, names(room))
    module = importlib.import_module(f"llmprune.{room}.{name.replace('-', '_')}")
    found = [
        c
        for c in vars(module).values()
        if inspect.isclass(c) and issubclass(c, Algorithm) and c.__module__ == module.__name__
    ]
    assert len(found) == 1, f"{module.__name__} must define exactly one algorithm"
    return found[0]


def build(room: str, name: str, options: Mapping[str, Any]) -> Any:
    """An algorithm with the given options.

    Raises:
        ValueError: an unknown algorithm or option, a wrong type, or a value out of range.
    """
    cls = find(room, name)
    types = get_type_hints(cls.Config)
    for key, value in options.items():
        if key not in types:
            raise nearest(f"option of {kind_of(room)} {shown(name)}", key, types or ["(none)"])
        if get_origin(types[key]) is tuple:
            options = {**options, key: _numbers(key, name, value)}
            continue
        if get_origin(types[key]) is Mapping:
            if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
                raise ValueError(
                    f"option {shown(key)} of {shown(name)} must be a mapping, got {shown(value)}"
                )
            continue
        if types[key] is float and isinstance(value, str):
            value = _number(value)  # YAML reads 1e-4 as text, since it wants a decimal point: 1.0e-4
            options = {**options, key: value}
        wanted = (int, float) if types[key] is float else types[key]
        if not isinstance(value, wanted) or (isinstance(value, bool) and types[key] is not bool):
            raise ValueError(
                f"option {shown(key)} of {shown(name)} must be {types[key].__name__}, got {shown(value)}"
            )
        if types[key] is float and not _finite(value):
            raise ValueError(f"option {shown(key)} of {shown(name)} must be finite, got {shown(value)}")
    return cls(cls.Config(**options))


def _finite(value: float) -> bool:
    """Whether a number is finite, and not too large for a float."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _number(text: str) -> Any:
    """The number that a text stands for; the text itself if it is no number."""
    try:
        return float(text)
    except ValueError:
        return text


def _numbers(key: str, name: str, value: Any) -> tuple[float, ...]:
    """The value of an option that takes a list of numbers; a single number is a list of one."""
    items = value if isinstance(value, (list, tuple)) else [value]
    values = [_number(v) if isinstance(v, str) else v for v in items]
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and _finite(v) for v in values):
        raise ValueError(
            f"option {shown(key)} of {shown(name)} must be a list of numbers, got {shown(value)}"
        )
    return tuple(float(v) for v in values)


def describe(room: str, name: str) -> dict[str, Any]:
    """An algorithm's summary and its options with their defaults.

    The summary is the first paragraph of the algorithm's file, which names the paper.
    """
    cls = find(room, name)
    paragraph = (inspect.getdoc(inspect.getmodule(cls)) or "").partition("\n\n")[0]
    return {"summary": " ".join(paragraph.split()), "options": dataclasses.asdict(cls.Config())}
