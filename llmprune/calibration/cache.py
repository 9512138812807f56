"""Keeps calibration rows on disk, so that the same rows are made only once. N rows, T tokens.

A file is named after the hash of everything its rows depend on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmprune.calibration.tokens import digest, read_tokens
from llmprune.common.folders import cache_folder
from llmprune.common.messages import first_line

Made = tuple[Tensor, dict[str, Any]]  # rows [N, T], and what the record says about how they were made
_log = logging.getLogger(__name__)


class Cache:
    """The cache of one run. If its folder cannot be used, rows are made anew and one warning is logged."""

    def __init__(self) -> None:
        self._warned = False

    def rows(self, key: tuple[object, ...], shape: tuple[int, int], make: Callable[[], Made]) -> Made:
        """Rows from the cache; where they are not in it, they are made and stored.

        Args:
            key: everything the rows depend on; its `repr` is hashed.
            shape: [N, T] of the rows.
            make: makes the rows.
        """
        hashed = hashlib.sha256(repr(("digest", key)).encode()).hexdigest()[:32]
        try:
            path = cache_folder() / "calibration" / f"{hashed}.safetensors"
            kept = _read(path, shape) if path.exists() else None
        except (OSError, RuntimeError) as error:  # no access; RuntimeError: no home folder
            self._warn(f"the cache of calibration tokens cannot be read ({first_line(error)})")
            return make()
        except ValueError as error:
            self._warn(
                f"a file of the cache of calibration tokens is damaged and made again ({first_line(error)})",
                remedy="",
            )
            kept = None
        if kept is not None:
            return kept
        made = make()
        try:
            _write(path, made)
        except (OSError, SafetensorError) as error:
            self._warn(f"the cache of calibration tokens cannot be written ({first_line(error)})")
        return made

    def _warn(
        self,
        what: str,
        remedy: str = "; going on without it: LLMPRUNE_CACHE names another folder",
    ) -> None:
        if not self._warned:
            _log.warning("%s%s", what, remedy)
        self._warned = True


def _read(path: Path, shape: tuple[int, int]) -> Made:
    tokens = read_tokens(path)
    if tuple(tokens.shape) != shape:
        raise ValueError(f"{path} has rows of {list(tokens.shape)}, not {list(shape)}")
    with safe_open(path, framework="pt") as file:  # `read_tokens` has checked the header
        kept = file.metadata() or {}
    try:
        details = dict(json.loads(kept["details"]))
    except (LookupError, ValueError, TypeError, RecursionError):
        raise ValueError(f"{path} has damaged metadata") from None
    if kept.get("digest") != digest(tokens):
        raise ValueError(f"{path} has other tokens than were written")
    return tokens, details


def _write(path: Path, made: Made) -> None:
    tokens, details = made
    metadata = {"details": json.dumps(details), "digest": digest(tokens)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file({"tokens": tokens}, temporary, metadata=metadata)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
