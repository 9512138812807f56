"""The Python function `generate`: a model tried out on a text."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from llmprune.api.arguments import AnyPath, checked
from llmprune.api.checkpoints import load
from llmprune.checkpoint.contents import CONFIG
from llmprune.checkpoint.packed_entry import packing_entry
from llmprune.checkpoint.reader import read_json
from llmprune.hub.download import locate
from llmprune.kernels.library import status
from llmprune.machine import device as devices
from llmprune.model.config import read_config, token_limit
from llmprune.model.tokenizer import read_tokenizer


@checked()
def generate(
    path: AnyPath,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
    stream: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Let a model go on with a text, to try a dense or packed checkpoint out.

    Args:
        path: `demo`, an alias, a hub id or a folder, dense or packed.
        prompt: the text.
        max_new_tokens: at most so many tokens.
        temperature: of sampling; 0 takes the likeliest token each time.
        seed: of sampling.
        revision: branch, tag or commit of a model of the hub; None for its default branch.
        trust_remote_code: run Python code of the checkpoint.
        stream: called with the text piece by piece, as it comes.

    Returns:
        A dict with `text`, `prompt_tokens`, `tokens`, `first_token_seconds`, `tokens_per_second` (after the
        first token), `load_seconds`, `format`, `kernels` (of packed weights; None for dense ones) and
        `peak_memory_bytes`.

    Raises:
        ValueError: no such model, no tokenizer, values out of range, or more tokens than the model takes.
    """
    from llmprune.runtime.generation import Sampling
    from llmprune.runtime.generation import generate as go_on

    sampling = Sampling(tokens=max_new_tokens, temperature=temperature, seed=seed)
    sampling.check()
    located = locate(os.fspath(path), revision, trust_remote_code)
    limit = token_limit(read_config(located.folder, trust_remote_code))
    tokenizer = read_tokenizer(located.folder, trust_remote_code)
    if tokenizer is None:
        raise ValueError(f"{path} has no tokenizer, which text needs; put its files into the folder")
    _check_length(tokenizer, prompt, max_new_tokens, limit)
    packed = packing_entry(read_json(located.folder / CONFIG)) is not None
    started = time.monotonic()
    model = load(path, revision=revision, trust_remote_code=trust_remote_code).eval()
    loaded = time.monotonic() - started
    return {
        **go_on(model, tokenizer, prompt, sampling, stream or (lambda text: None)),
        "load_seconds": round(loaded, 3),
        "format": "packed" if packed else "dense",
        "kernels": status() if packed else None,
        "peak_memory_bytes": devices.peak_memory(),
    }


def _check_length(tokenizer: Any, prompt: str, new: int, limit: int | None) -> None:
    """Raise `ValueError` where a prompt has no token, or there would be more tokens than a model takes."""
    count = len(tokenizer(prompt)["input_ids"])
    if count == 0:
        raise ValueError("the prompt has no token; give some text")
    if limit is None or count + new <= limit:
        return
    room = limit - count
    remedy = f"use --max-new-tokens {room} or less" if room > 0 else "give a shorter prompt"
    raise ValueError(
        f"the prompt has {count} token{'s' * (count != 1)}, and with {new} new ones that is over the "
        f"model's limit of {limit}; {remedy}"
    )
