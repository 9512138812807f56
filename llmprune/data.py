"""Finds the shipped data folders (`recipes`, `eval`) in a checkout and in an installed wheel alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def shipped(*parts: str) -> Path:
    """The path of a shipped folder or file below `recipes/` or `eval/`."""
    package = Path(__file__).resolve().parent
    inside = package / "_data" / Path(*parts)  # where the wheel puts them
    return inside if inside.exists() else package.parent / Path(*parts)


def shipped_names(*parts: str) -> list[str]:
    """Names of the YAML files in a shipped folder."""
    return sorted(p.stem for p in shipped(*parts).glob("*.yaml"))


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping from a YAML file, loaded safely. Raises `ValueError` naming the file otherwise."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a YAML mapping, got {type(value).__name__}")
    return value


def shown(value: Any) -> str:
    """A value from a file as it stands in a message: never longer than a line."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # too deep, or a number of too many digits
        text = f"a {type(value).__name__}"
    text = " ".join(line.strip() for line in text.splitlines())  # arrays and modules take several
    return text if len(text) <= 120 else text[:117] + "..."
