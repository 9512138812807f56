"""Reads the licence that a checkpoint's own model card (README.md) names; without one, nothing is guessed."""

from __future__ import annotations

from pathlib import Path

from llmprune.common.cards import entry, front_matter

_VALUE = {
    "license": r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}",
    "license_name": r"[A-Za-z0-9][\w.+ -]{0,99}",
    "license_link": r"[^\s\"'<>`|]{1,300}",
}


def read_licence(folder: Path | None) -> dict[str, str | None]:
    """The entries `license` (an id of the hub), `license_name` and `license_link` of a folder's card.

    An entry is None where the card does not have it, or has no plausible value for it.
    """
    front = "" if folder is None else front_matter(folder / "README.md")
    found = {key: entry(front, key, pattern) for key, pattern in _VALUE.items()}
    return found | {"license": found["license"] and found["license"].lower()}
