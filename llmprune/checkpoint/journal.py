"""The journal of a run: what it is, and what of it is finished and durable. One JSON object a line, synced before it counts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from llmprune.checkpoint.files import sync_folder, write_durably

Identity = dict[str, Any]  # part of the run -> what must be the same for its results to be the same


class Journal:
    """Lines of a file: the identity first, then entries. A line torn by a crash was never finished and is cut off.

    `anew`: what the file holds is not read, since `begin` will replace it.
    """

    def __init__(self, path: Path, anew: bool = False) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        whole = path.read_bytes().rpartition(b"\n")[0] if path.is_file() and not anew else b""
        try:
            lines = [json.loads(line) for line in whole.split(b"\n") if line]
            self.identity: Identity | None = lines[0]["identity"] if lines else None
            self.entries = [dict(line) for line in lines[1:]]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise ValueError(
                f"{path} is damaged, so the unfinished run cannot go on; begin anew with --restart"
            ) from None
        self._length = len(whole) + 1 if whole else 0

    @property
    def blocks(self) -> list[dict[str, Any]]:
        """The entries of finished blocks, in order."""
        return [entry for entry in self.entries if "block" in entry]

    def find(self, key: str) -> Any:
        """The value of the first entry with a key, None where there is none."""
        return next((entry[key] for entry in self.entries if key in entry), None)

    def begin(self, identity: Identity, files: list[str] | None = None) -> None:
        """Start a new journal. `files`: the names of the files that the run will write, None where they are not known yet."""
        line = json.dumps({"identity": identity, "files": files}).encode() + b"\n"
        write_durably(self.path, [line])
        self.identity, self.entries, self._length = identity, [], len(line)

    def add(self, entry: dict[str, Any]) -> None:
        """Append an entry; once this returns, it survives a crash."""
        line = json.dumps(entry).encode() + b"\n"
        with self.path.open("r+b") as file:
            file.truncate(self._length)
            file.seek(self._length)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._length += len(line)
        self.entries.append(entry)


def remove(path: Path) -> None:
    """Remove a file durably."""
    path.unlink(missing_ok=True)
    sync_folder(path.parent)


def difference(before: Identity, now: Identity) -> str | None:
    """What differs between two identities, in words; None when nothing does."""
    old, new = _flat(json.loads(json.dumps(before))), _flat(json.loads(json.dumps(now)))
    for key in [*new, *(k for k in old if k not in new)]:
        if old.get(key) != new.get(key):
            return f"{key} was {_short(old.get(key))} and is {_short(new.get(key))}"
    return None


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {
            k: v
            for name, inner in value.items()
            for k, v in _flat(inner, f"{prefix}.{name}" if prefix else str(name)).items()
        }
    return {prefix: value}


def _short(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "..."
