"""Finds the data files that ship with the package (`recipes/`, `eval/`), and loads YAML safely.

The files are found both in a checkout and in an installed wheel.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from llmprune.common.messages import shown


def shipped(*parts: str) -> Path:
    """The path of a shipped folder or file below `recipes/` or `eval/`."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "_data" / Path(*parts)  # in a wheel; a checkout has no such folder
    return inside if inside.exists() else package.parent / Path(*parts)


def shipped_names(*parts: str) -> list[str]:
    """The names of the YAML files in a shipped folder, without `.yaml`, sorted."""
    return sorted(p.stem for p in shipped(*parts).glob("*.yaml"))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises `ValueError`, naming the file, if it cannot be read or holds something else.
    """
    try:
        value = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a YAML mapping, got {type(value).__name__}")
    return value


def _without_base_60(tag: str, pattern: re.Pattern[str]) -> re.Pattern[str]:
    """What yaml knows a plain value by; that of a number takes no colons."""
    number = tag.rpartition(":")[2] in ("int", "float")
    return re.compile(rf"(?!.*:)(?:{pattern.pattern})", pattern.flags) if number else pattern


class _Loader(yaml.SafeLoader):
    """yaml's safe loader, but a key given twice is refused, where yaml itself silently drops the first value,
    and 2:4 is a text, where yaml reads a number in base 60.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise ValueError(f"key {shown(twice)} stands twice (line {node.start_mark.line + 1}); keep one")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, _without_base_60(tag, pattern)) for tag, pattern in found]
    for letter, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. Raises `ValueError`, in one line, if it is not YAML."""
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a number with too many digits
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
