"""The journal of a run: which run it is and which of its blocks are finished, so that it can be resumed.

Each line is a JSON object, which is written to the disk before the run goes on.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from llmprune.checkpoint.contents import TEMPORARY
from llmprune.checkpoint.files import sync_folder, write_durably

Identity = dict[str, Any]  # everything that two runs must have in common to give the same results


class Journal:
    """A journal file: first a line with the identity of the run, then one line per entry.

    A last line that a crash cut short does not count and is removed. With `anew` the file is not read, since
    `begin` will replace it.

    Raises:
        ValueError: the file is damaged.
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

    @property
    def trains(self) -> bool:
        """Whether the state of a training lies beside it."""
        return any("training" in entry for entry in self.entries)

    def find(self, key: str) -> Any:
        """The value under `key` in the first entry that has it; None if there is none."""
        return next((entry[key] for entry in self.entries if key in entry), None)

    def begin(self, identity: Identity, files: list[str] | None = None) -> None:
        """Start a new journal. `files`: names of the files that the run will write; None if not known yet."""
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
    """Remove a file durably, and what a killed write of it has left."""
    path.unlink(missing_ok=True)
    path.with_name(path.name + TEMPORARY).unlink(missing_ok=True)
    sync_folder(path.parent)


def difference(before: Identity, now: Identity) -> str | None:
    """The first difference between two identities, in words; None if they are equal."""
    old, new = _flat(json.loads(json.dumps(before))), _flat(json.loads(json.dumps(now)))
    for key in [*new, *(k for k in old if k not in new)]:
        if old.get(key) != new.get(key):
            return f"{key} was {_short(old.get(key))} and is {_short(new.get(key))}"
    return None


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, whose keys are the paths to the values: `model.dtype`."""
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        flat.update(_flat(inner, f"{prefix}.{name}" if prefix else str(name)))
    return flat


def _short(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "..."
