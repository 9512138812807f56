"""The licence a checkpoint's own model card (README.md) names. What it does not say is not made up."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

_LONGEST_CARD = 1 << 20  # cards with thousands of scores before the text exist; more than this is no card
_LONGEST_ENTRY = 2000
_VALUE = {
    "license": r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}",
    "license_name": r"[A-Za-z0-9][\w.+ -]{0,99}",
    "license_link": r"[^\s\"'<>`|]{1,300}",
}


def read_licence(folder: Path | None) -> dict[str, str | None]:
    """`license` (an id as the hub writes it), `license_name` and `license_link` of a folder's card; None where it does not say."""
    front = "" if folder is None else front_matter(folder / "README.md")
    return {key: _entry(front, key, pattern) for key, pattern in _VALUE.items()}


def front_matter(card: Path) -> str:
    """The YAML between the two lines of dashes at the top of a card, unparsed; empty where there is none."""
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


def _entry(front: str, key: str, pattern: str) -> str | None:
    # Only the entry itself is parsed: a card may be long, or broken elsewhere, and still name its licence.
    found = re.search(rf"^{key}[ \t]*:.*(?:\n(?:[ \t]|- ).*)*", front, re.MULTILINE)
    if found is None or len(found[0]) > _LONGEST_ENTRY:
        return None
    try:
        value: Any = yaml.safe_load(found[0])[key]
    except Exception:  # hostile YAML raises many types
        return None
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str) or not re.fullmatch(pattern, value, re.ASCII):
        return None
    return value.lower() if key == "license" else value
