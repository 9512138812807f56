"""Token rows on disk under the hash of everything they depend on, so that the same rows are made once. N rows, T tokens."""

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
from llmprune.common.messages import first_line

Made = tuple[Tensor, dict[str, Any]]  # rows, and what the record says of how they were made
_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where tokens are kept: `LLMPRUNE_CACHE`, or `llmprune` in the user's cache folder (`XDG_CACHE_HOME`, if it is absolute)."""
    if own := os.environ.get("LLMPRUNE_CACHE"):
        return Path(own).expanduser()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "llmprune"


class Cache:
    """Rows of one run. Where the folder cannot be used the rows are made all the same, and the log says so once."""

    def __init__(self) -> None:
        self._told = False

    def rows(self, key: tuple[object, ...], shape: tuple[int, int], make: Callable[[], Made]) -> Made:
        """Rows [N, T] from the cache, or made and put there. The file's name is the hash of the key."""
        try:
            path = (
                cache_folder()
                / "calibration"
                / f"{hashlib.sha256(repr(('digest', key)).encode()).hexdigest()[:32]}.safetensors"
            )
            kept = _read(path, shape) if path.exists() else None
        except (OSError, RuntimeError) as error:  # no access; no home folder
            self._tell(f"the cache of calibration tokens cannot be read ({first_line(error)})")
            return make()
        except ValueError as error:
            self._tell(
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
            self._tell(f"the cache of calibration tokens cannot be written ({first_line(error)})")
        return made

    def _tell(
        self, what: str, remedy: str = "; going on without it: LLMPRUNE_CACHE names another folder"
    ) -> None:
        if not self._told:
            _log.warning("%s%s", what, remedy)
        self._told = True


def _read(path: Path, shape: tuple[int, int]) -> Made:
    tokens = read_tokens(path)
    if tuple(tokens.shape) != shape:
        raise ValueError(f"{path} has rows of {list(tokens.shape)}, not {list(shape)}")
    with safe_open(path, framework="pt") as file:  # its header was checked when the tokens were read
        kept = file.metadata() or {}
    try:
        details = dict(json.loads(kept["details"]))
    except (LookupError, ValueError, TypeError, RecursionError):
        raise ValueError(f"{path} has damaged metadata") from None
    if kept.get("digest") != digest(tokens):
        raise ValueError(f"{path} has other tokens than were written")
    return tokens, details


def _write(path: Path, made: Made) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file(
            {"tokens": made[0]},
            temporary,
            metadata={"details": json.dumps(made[1]), "digest": digest(made[0])},
        )
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
