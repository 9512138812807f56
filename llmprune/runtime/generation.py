"""Text from a loaded model, with its speed: tokens after the first one, per second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer

from llmprune.common.messages import shown


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How text goes on.

    Attributes:
        tokens: at most so many new ones.
        temperature: of sampling; 0 takes the likeliest token each time.
        seed: of sampling.
    """

    tokens: int = 64
    temperature: float = 0.0
    seed: int = 0

    def check(self) -> None:
        """Raise `ValueError` for values out of range."""
        if self.tokens < 1:
            raise ValueError(f"max_new_tokens must be a whole number from 1, got {self.tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be a number from 0, got {self.temperature}")
        if type(self.seed) is not int or self.seed < 0:
            raise ValueError(f"seed must be a whole number from 0, got {shown(self.seed)}")


class _Streamer(TextStreamer):  # type: ignore[misc]
    """Passes text on as soon as it is whole words, and notes when tokens come."""

    def __init__(self, tokenizer: Any, stream: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._stream = stream
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())  # first the prompt, then token by token
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._stream(text)


def generate(
    model: Any, tokenizer: Any, prompt: str, sampling: Sampling, stream: Callable[[str], None]
) -> dict[str, Any]:
    """Go on with a prompt; `stream` gets the text piece by piece.

    Returns:
        `text` (new), `prompt_tokens`, `tokens` (new), `first_token_seconds`, `tokens_per_second`.
    """
    inputs = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    if not inputs.numel():
        raise ValueError("the prompt has no token; give some text")
    streamer = _Streamer(tokenizer, stream)
    options: dict[str, Any] = {"do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        options["temperature"] = sampling.temperature
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(sampling.seed)
        mask = torch.ones_like(inputs)
        result = model.generate(
            inputs, attention_mask=mask, max_new_tokens=sampling.tokens, streamer=streamer, **options
        )
    new, times = result[0, inputs.shape[1] :], streamer.times
    after = times[-1] - times[1] if len(times) > 2 else 0.0
    return {
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "prompt_tokens": inputs.shape[1],
        "tokens": len(new),
        "first_token_seconds": round(times[1] - times[0], 4),
        "tokens_per_second": round((len(new) - 1) / after, 3) if after else None,
    }
