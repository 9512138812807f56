"""Detects changes of a checkpoint's small files (config, tokenizer, index, licence) during a run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from llmprune.checkpoint.contents import CARD, INDEX, is_companion
from llmprune.checkpoint.files import changed


class Snapshot:
    """Remembers digests of a folder's small files.

    A file read later must be unchanged; files that appear later are ignored.

    Args:
        folder: the checkpoint's.
        rewritten: makes of the content of a file, by name, what the output gets in its place.
    """

    def __init__(
        self, folder: Path, rewritten: Mapping[str, Callable[[bytes], bytes]] = MappingProxyType({})
    ) -> None:
        self.folder, self._rewritten = folder, rewritten
        self._digests: dict[str, bytes] = {}
        for name in sorted(path.name for path in folder.iterdir()):
            if name in (INDEX, CARD) or is_companion(name, code=True):
                data = _content(folder / name)
                if data is not None:
                    self._digests[name] = _digest(data)

    def companions(self, code: bool) -> list[str]:
        """The files that are copied into the output; Python files only with `code`."""
        return [name for name in self._digests if is_companion(name, code)]

    def appeared(self) -> list[str]:
        """Files that would be copied into the output, but were not there when the run began."""
        companions = (path.name for path in self.folder.iterdir() if is_companion(path.name, code=True))
        return sorted(name for name in companions if name not in self._digests)

    def read(self, name: str) -> bytes:
        """The content of one of the files, for the output. Raises `ValueError` if it has changed."""
        data = _content(self.folder / name)
        if data is None or _digest(data) != self._digests[name]:
            raise changed(self.folder / name)
        return self._rewritten[name](data) if name in self._rewritten else data

    def check(self) -> None:
        """Raise `ValueError` if one of the files has changed."""
        for name in self._digests:
            self.read(name)


def _content(path: Path) -> bytes | None:
    """The content of a file; None if there is none or it cannot be read."""
    try:
        return path.read_bytes() if path.is_file() else None
    except OSError:
        return None


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
