"""One run per output folder: a lock that dies with its process, with a note of who holds it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
import time
from pathlib import Path
from typing import TextIO


class Lock:
    """An exclusive lock on a file. The kernel releases it when the process ends, however it ends.

    Raises:
        ValueError: another process holds it; the line names the process, its machine and since when.
    """

    def __init__(self, path: Path, what: str) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self._file = _opened(path)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.seek(0)
                owner = _owner(self._file.read(1000))
                self._file.close()
                raise ValueError(
                    f"{what} is being written by {owner}; wait for it to end, or choose another --output"
                ) from None
            if path.exists() and os.path.samestat(path.stat(), os.fstat(self._file.fileno())):
                break
            self._file.close()  # the holder before us removed the file between our opening and our locking it
        self._file.seek(0)
        # Torn by a crash it may be, but not something else.
        if (note := self._file.read(1000).strip("\0")) and not note.startswith('{"pid"'):
            self._file.close()
            raise ValueError(
                f"{path} is no lock of llmprune and would have to be replaced; move it away, or choose another --output"
            )
        self._file.seek(0)
        self._file.truncate(0)
        json.dump(
            {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")},
            self._file,
        )
        self._file.flush()

    def release(self) -> None:
        """Give it up and remove the file."""
        if not self._file.closed:
            self._path.unlink(missing_ok=True)
            self._file.close()


def _opened(path: Path) -> TextIO:
    """The file, made where it is not there, and never another one that a link leads to."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise OSError
        return os.fdopen(handle, "r+", encoding="utf-8", errors="replace")
    except OSError as error:
        if error.errno in (None, errno.EISDIR, errno.ELOOP, errno.ENXIO):
            raise ValueError(
                f"{path} is no lock of llmprune and would have to be replaced; move it away"
            ) from None
        raise


def _owner(note: str) -> str:
    try:
        owner = json.loads(note)
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (ValueError, LookupError, TypeError):
        return "another process"
