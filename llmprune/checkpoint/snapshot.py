"""The small files of a checkpoint folder as they were when a run began: config, tokenizer, index, licence."""

from __future__ import annotations

import hashlib
from pathlib import Path

from llmprune.checkpoint.contents import CARD, INDEX, is_companion
from llmprune.checkpoint.files import changed


class Snapshot:
    """Digests of a folder's small files. What is read of them later must be what it was; files that appear later are none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = (
            p.name for p in folder.iterdir() if p.name in (INDEX, CARD) or is_companion(p.name, code=True)
        )
        self._digests = {
            name: _digest(data) for name in sorted(names) if (data := _content(folder / name)) is not None
        }

    def companions(self, code: bool) -> list[str]:
        """The files that go along with the weights; Python files only with `code`."""
        return [name for name in self._digests if is_companion(name, code)]

    def appeared(self) -> list[str]:
        """Files that would go along with the weights and were not there when the run began."""
        return sorted(
            p.name
            for p in self.folder.iterdir()
            if is_companion(p.name, code=True) and p.name not in self._digests
        )

    def read(self, name: str) -> bytes:
        """The content of one of the files. Raises `ValueError` where it is not what it was."""
        data = _content(self.folder / name)
        if data is None or _digest(data) != self._digests[name]:
            raise changed(self.folder / name)
        return data

    def check(self) -> None:
        """Raise `ValueError` where one of the files is not what it was."""
        for name in self._digests:
            self.read(name)


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes() if path.is_file() else None
    except OSError:
        return None


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
