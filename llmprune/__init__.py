"""llmprune: prune a pretrained language model after training, score it, and save it where others can load it.

`import llmprune` is instant: torch and transformers are imported when one of the functions is first used.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from llmprune.common.version import __version__
from llmprune.machine.threads import settle
from llmprune.runtime.hook import install

# torch reads both settings when it is imported, so they are made here; a value the user has set stays.
# With THP_MEM_ALLOC_ENABLE large tensors lie in huge pages, which the system allocates many times faster.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
settle(os.environ)
install()

__all__ = [
    "MaskKeeper",
    "__version__",
    "accelerate",
    "bench",
    "compare",
    "convert",
    "evaluate",
    "generate",
    "inspect",
    "load",
    "mask_apply",
    "mask_check",
    "mask_diff",
    "merge_adapter",
    "prune",
    "published",
    "push",
    "recover",
    "run_model",
    "sweep",
]

if TYPE_CHECKING:
    from llmprune.api import (
        MaskKeeper,
        accelerate,
        bench,
        compare,
        convert,
        evaluate,
        generate,
        inspect,
        load,
        mask_apply,
        mask_check,
        mask_diff,
        merge_adapter,
        prune,
        published,
        push,
        recover,
        run_model,
        sweep,
    )


def __getattr__(name: str) -> Any:
    if name in __all__:
        from llmprune import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
