"""How long a loaded model takes to go on with tokens: a prompt, and each token after it."""

from __future__ import annotations

import itertools
import time
from statistics import median
from typing import Any

import torch

NEW = 9  # tokens that are decoded at a time; the first of them is the prompt's
PROMPT = 16  # tokens before them


class _Times:
    """Takes the place of a streamer: notes when tokens come."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, tokens: Any) -> None:
        """First the prompt, then token by token."""
        self.at.append(time.perf_counter())

    def end(self) -> None:
        """Nothing."""


def prompt_of(limit: int | None) -> int:
    """Tokens of the prompt before decoding, of a model that takes `limit` tokens; None for any number."""
    return PROMPT if limit is None else max(1, min(PROMPT, limit - NEW))


def seconds_for(model: Any, tokens: int, limit: int | None) -> float:
    """Seconds that a model takes for `tokens` tokens.

    Args:
        model: of transformers, with a method `generate`.
        tokens: of a prompt, from its start to the first new token; 1 for a token that is decoded after
            others, of which this is the median of several.
        limit: tokens that the model takes.
    """
    if tokens > 1:
        times = _times(model, tokens, 1)
        return times[1] - times[0]
    times = _times(model, prompt_of(limit), NEW)
    return median(after - before for before, after in itertools.pairwise(times[1:]))


@torch.no_grad()
def _times(model: Any, prompt: int, new: int) -> list[float]:
    """When the prompt and each new token came."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    # Tokens with a meaning of their own stand at either end of a vocabulary.
    low, high = vocabulary // 4, max(vocabulary // 4 + 1, vocabulary // 2)
    tokens = torch.randint(low, high, (1, prompt), generator=torch.Generator().manual_seed(0))
    times = _Times()
    model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        min_new_tokens=new,
        max_new_tokens=new,
        streamer=times,
    )
    return times.at
