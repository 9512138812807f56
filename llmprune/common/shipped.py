"""The data folders that ship with the package (`recipes`, `eval`), in a checkout and in an installed wheel alike, and safe YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from llmprune.common.messages import shown


def shipped(*parts: str) -> Path:
    """The path of a shipped folder or file below `recipes/` or `eval/`."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "_data" / Path(*parts)  # where the wheel puts them
    return inside if inside.exists() else package.parent / Path(*parts)


def shipped_names(*parts: str) -> list[str]:
    """Names of the YAML files in a shipped folder."""
    return sorted(p.stem for p in shipped(*parts).glob("*.yaml"))


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping from a YAML file, loaded safely. Raises `ValueError` naming the file otherwise."""
    try:
        value = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a YAML mapping, got {type(value).__name__}")
    return value


class _Loader(yaml.SafeLoader):
    """The safe loader, which also refuses a key that stands twice: the first of the two would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise ValueError(f"key {shown(twice)} stands twice (line {node.start_mark.line + 1}); keep one")
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, loaded safely. Raises `ValueError`, in one line, for what is not YAML."""
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (
        yaml.YAMLError,
        RecursionError,
        ValueError,
    ) as error:  # ValueError: a number of too many digits, for one
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
