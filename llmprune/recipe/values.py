"""Plain values of a recipe, checked: numbers, lists, and dataclasses made of them."""

from __future__ import annotations

import math
from typing import Any, get_type_hints

from llmprune.common.messages import nearest, shown


def group(cls: type, key: str, value: Any) -> Any:
    """A dataclass from a mapping of its fields, whose types are checked."""
    if not isinstance(value, dict):
        raise ValueError(f"{key} must be a mapping of its fields, got {shown(value)}")
    hints = get_type_hints(cls)
    found: dict[str, Any] = {}
    for name, inner in value.items():
        if name not in hints:
            raise nearest(f"key of {key}", name, hints)
        if hints[name] is float:
            inner = number(f"{key}.{name}", inner)
        elif hints[name] is int or hints[name] is bool or hints[name] is str:
            if type(inner) is not hints[name]:
                raise ValueError(f"{key}.{name} must be {hints[name].__name__}, got {shown(inner)}")
        else:
            inner = tuple(number(f"{key}.{name}", one) for one in listed(f"{key}.{name}", inner))
        found[name] = inner
    return cls(**found)


def listed(key: str, value: Any) -> list[Any]:
    """A list, or a tuple as one; `ValueError` for anything else."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{key} must be a list of numbers, got {shown(value)}")
    return list(value)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; YAML reads 1e-4 as text, since it wants a decimal point."""
    try:
        return (
            isinstance(value, (int, float, str)) and type(value) is not bool and math.isfinite(float(value))
        )
    except (ValueError, OverflowError):
        return False


def number(key: str, value: Any) -> float:
    """A finite number; `ValueError` for anything else."""
    if not is_number(value):
        raise ValueError(f"{key} must be a finite number, got {shown(value)}")
    return float(value)
