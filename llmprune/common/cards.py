"""Reads the entries at the top of model cards (README.md)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

_LONGEST_CARD = 1 << 20  # bytes read; some cards have thousands of scores before their text
_LONGEST_ENTRY = 2000  # characters


def front_matter(card: Path) -> str:
    """The YAML at the top of a card, between two lines of dashes, as text; empty where there is none."""
    try:
        with card.open("rb") as handle:
            text = handle.read(_LONGEST_CARD).decode("utf-8", errors="replace")
    except OSError:
        return ""
    lines = text.lstrip("\ufeff").splitlines()
    if not lines or lines[0].rstrip() != "---":
        return ""
    end = next((i for i, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), 0)
    return "\n".join(lines[1:end])


def entry(front: str, key: str, pattern: str) -> str | None:
    """The text of an entry, or the only text of its list; None where it is missing or not as `pattern`."""
    # Only the entry itself is parsed: the card may be long, or broken elsewhere, and still name its licence.
    found = re.search(rf"^{key}[ \t]*:.*(?:\n(?:[ \t]|- ).*)*", front, re.MULTILINE)
    if found is None or len(found[0]) > _LONGEST_ENTRY:
        return None
    try:
        value: Any = yaml.safe_load(found[0])[key]
    except Exception:  # malformed YAML may raise errors of many types
        return None
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str) or not re.fullmatch(pattern, value, re.ASCII):
        return None
    return value
