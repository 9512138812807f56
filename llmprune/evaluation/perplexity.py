"""Perplexity by the papers' protocol, streamed block by block: a model larger than memory can be scored.

The documents are joined, tokenised as one text with the tokenizer's defaults, cut into non-overlapping windows of T tokens; each
window's loss is the mean over its T - 1 targets; perplexity is the exponential of the mean over windows. What is left over at the end
is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from llmprune.checkpoint.reader import read_ahead
from llmprune.machine.device import exact_matmul
from llmprune.machine.processes import ALONE, Team
from llmprune.model.activations import BlockInputs
from llmprune.model.skeleton import Skeleton
from llmprune.text.tokenisation import check_known, check_made, first_tokens, tokens_of

STORE_BYTES = 1 << 30  # windows whose block inputs fit in this go through the model together


def windows(
    text: Iterable[str], tokenizer: Any, length: int, limit: int | None, vocabulary: int, name: str
) -> Tensor:
    """The evaluation windows int64 [N, T] of a text that comes in pieces; no more is read than N windows need.

    Raises `ValueError` when the text is shorter than one window, or its tokens are none of the model's.
    """
    tokens = first_tokens(tokens_of(text, tokenizer, name), limit and limit * length)
    assert tokens is not None
    check_made(tokens, tokenizer, name)
    check_known(tokens, vocabulary, f"tokens of {name}")
    count = len(tokens) // length
    if count == 0:
        raise ValueError(
            f"{name} has {len(tokens)} tokens, less than one window of {length}; use a longer text or --eval-seqlen {len(tokens)}"
        )
    return tokens[: count * length].view(count, length)[:limit]


def protocol(name: str, rows: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """What the number means, stored with it."""
    return {
        "text": name,
        "window": rows.shape[1],
        "windows": len(rows),
        "mean": "exp of the mean over non-overlapping windows of the mean loss over window - 1 targets",
        "dtype": str(dtype).removeprefix("torch."),
    }


def perplexity(
    skeleton: Skeleton,
    rows: Tensor,
    block_done: Callable[[], None] = lambda: None,
    note: Callable[[str], None] = lambda text: None,
    team: Team = ALONE,
) -> float:
    """Perplexity of token windows [N, T] under the skeleton's checkpoint, one block in memory; the processes share the windows."""
    width = (
        skeleton.model.config.get_text_config().hidden_size
        * torch.empty(0, dtype=skeleton.dtype).element_size()
    )
    chunk = max(1, STORE_BYTES // (rows.shape[1] * width))
    losses: list[float] = []
    with exact_matmul():
        for part in rows[team.share(len(rows))].split(chunk):
            if len(part):
                losses += _window_losses(skeleton, part, block_done, note)
    total = torch.tensor(sum(losses), dtype=torch.float64)
    team.add(total)
    mean = total.item() / len(rows)
    if not mean < 700:
        raise ValueError(
            f"the mean loss is {mean}, so perplexity is no finite number; the model is broken or its dtype overflows"
        )
    return math.exp(mean)


@torch.no_grad()
def _window_losses(
    skeleton: Skeleton, rows: Tensor, block_done: Callable[[], None], note: Callable[[str], None]
) -> list[float]:
    inputs = BlockInputs(skeleton, rows, skeleton.device, note=note)
    tensors = read_ahead(skeleton.source, skeleton.block_tensors())
    for number, name in enumerate(skeleton.blocks):
        names = skeleton.parameters_of(name)
        skeleton.fill(names, next(tensors))
        inputs.forward(number)
        skeleton.free(names)
        block_done()
    return losses_of(inputs, rows)


@torch.no_grad()
def losses_of(inputs: BlockInputs, rows: Tensor) -> list[float]:
    """The mean loss of each window [N, T] over its T - 1 targets, once `inputs` has passed the last block."""
    losses = []
    for part, logits in inputs.logits():
        for window, row in zip(rows[part].to(logits.device), logits, strict=True):
            losses.append(cross_entropy(row[:-1].float(), window[1:]).item())
    return losses
