"""The folder of what is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder of the cache: `LLMPRUNE_CACHE`, else `llmprune` in the user's cache folder.

    The latter is `XDG_CACHE_HOME` where that is an absolute path, else `~/.cache`.
    """
    if own := os.environ.get("LLMPRUNE_CACHE"):
        return Path(own).expanduser()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "llmprune"
