"""A lock that lets only one run at a time write an output folder, and says which process holds it."""

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

    Args:
        path: the lock file; it is removed with the lock.
        what: what the lock is for, in words, for the message.

    Raises:
        ValueError: another process holds it (the message names it, its machine and the time), or the file is
            no lock.
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
            self._file.close()  # the former holder removed the file after we opened it, before we locked it
        self._file.seek(0)
        # A crash may have left the file empty or incomplete; any other content is not ours.
        if (note := self._file.read(1000).strip("\0")) and not note.startswith('{"pid"'):
            self._file.close()
            raise _no_lock(path)
        self._file.seek(0)
        self._file.truncate(0)
        json.dump(
            {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")},
            self._file,
        )
        self._file.flush()

    def release(self) -> None:
        """Release the lock and remove its file."""
        if not self._file.closed:
            self._path.unlink(missing_ok=True)
            self._file.close()


def _opened(path: Path) -> TextIO:
    """Open the lock file, creating it if it is missing; links are not followed."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise OSError
        return os.fdopen(handle, "r+", encoding="utf-8", errors="replace")
    except OSError as error:
        if error.errno in (None, errno.EISDIR, errno.ELOOP, errno.ENXIO):
            raise _no_lock(path) from None
        raise


def _no_lock(path: Path) -> ValueError:
    """The error for a file, folder or link that is where the lock would be."""
    return ValueError(
        f"{path} is no lock of llmprune and would have to be replaced; "
        "move it away, or choose another --output"
    )


def _owner(note: str) -> str:
    """Who holds the lock, in words, from the content of its file."""
    try:
        owner = json.loads(note)
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (ValueError, LookupError, TypeError):
        return "another process"
