"""Token rows on disk under the hash of everything they depend on, so that the same rows are made once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmprune.calibration.tokens import read_tokens

Made = tuple[Tensor, dict[str, Any]]  # rows, and what the record says of how they were made


def cache_folder() -> Path:
    """Where tokens of downloaded text are kept: `LLMPRUNE_CACHE`, or `llmprune` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llmprune"
    return Path(os.environ.get("LLMPRUNE_CACHE", default))


def cached(key: tuple[object, ...], make: Callable[[], Made]) -> Made:
    """Rows from the cache, or made and put there. The file's name is the hash of the key."""
    path = cache_folder() / "calibration" / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.safetensors"
    if path.is_file():
        return read_tokens(path), _details(path)
    tokens, details = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_file({"tokens": tokens}, temporary, metadata={"details": json.dumps(details)})
    os.replace(temporary, path)
    return tokens, details


def _details(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:  # its header was checked when the tokens were read
        try:
            return dict(json.loads((file.metadata() or {}).get("details", "{}")))
        except (ValueError, TypeError, RecursionError):
            raise ValueError(f"{path} is damaged; delete it and its tokens are made again") from None
