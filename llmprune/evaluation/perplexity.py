"""Perplexity by the papers' protocol, with one block of the model in memory at a time.

The documents are joined, tokenised as one text with the tokenizer's defaults, and cut into non-overlapping
windows of T tokens; a shorter rest is dropped. The loss of a window is the mean over its T - 1 targets;
perplexity is the exponential of the mean loss over all windows. Since blocks are loaded one after another, a
model larger than memory can be scored.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from llmprune.checkpoint.files import raw
from llmprune.checkpoint.reader import read_ahead
from llmprune.machine.device import exact_matmul
from llmprune.machine.processes import ALONE, Team
from llmprune.model.activations import BlockInputs
from llmprune.model.skeleton import Skeleton
from llmprune.text.tokenisation import check_known, check_made, first_tokens, tokens_of

STORE_BYTES = 1 << 30  # windows pass the model together as long as their block inputs fit into this


def windows(
    text: Iterable[str],
    tokenizer: Any,
    length: int,
    limit: int | None,
    vocabulary: int,
    name: str,
) -> Tensor:
    """The evaluation windows int64 [N, T] of a text.

    Args:
        text: the text in pieces; no more of it is read than the windows need.
        length: tokens per window (T).
        limit: at most so many windows; None for all.
        vocabulary: the model's number of token ids.
        name: what error messages call the text.

    Raises:
        ValueError: the text is shorter than one window, or a token is not in the model's vocabulary.
    """
    tokens = first_tokens(tokens_of(text, tokenizer, name), limit and limit * length)
    assert tokens is not None
    check_made(tokens, tokenizer, name)
    check_known(tokens, vocabulary, f"tokens of {name}")
    count = len(tokens) // length
    if count == 0:
        raise ValueError(
            f"{name} has {len(tokens)} tokens, less than one window of {length}; use a longer text or "
            f"--eval-seqlen {len(tokens)}"
        )
    return tokens[: count * length].view(count, length)[:limit]


def fingerprint(rows: Tensor) -> str:
    """SHA-256 of the windows of a text, int64 [N, T]."""
    return f"sha256:{hashlib.sha256(raw(rows)).hexdigest()}"


def protocol(name: str, rows: Tensor, dtype: torch.dtype, limit: int | None) -> dict[str, Any]:
    """How a perplexity was measured; stored with its value.

    With a limit that left windows out, or may have, it is named: the figure is not one of the whole text.
    """
    return {
        "text": name,
        "digest": fingerprint(rows),
        "window": rows.shape[1],
        "windows": len(rows),
        "mean": "exp of the mean over non-overlapping windows of the mean loss over window - 1 targets",
        "dtype": str(dtype).removeprefix("torch."),
        **({"limit": limit} if limit == len(rows) else {}),
    }


def perplexity(
    skeleton: Skeleton,
    rows: Tensor,
    block_done: Callable[[], None] = lambda: None,
    note: Callable[[str], None] = lambda text: None,
    team: Team = ALONE,
) -> float:
    """The perplexity of a model on token windows, one block of it in memory at a time.

    Args:
        skeleton: the model without weights; they are read from its checkpoint.
        rows: the windows [N, T].
        block_done: called after each block.
        note: called with a message when memory runs out and the micro-batch is halved.
        team: the processes of this run, which share the windows.

    Raises:
        ValueError: the mean loss is NaN or too large for a finite perplexity.
    """
    token_bytes = skeleton.width * skeleton.dtype.itemsize
    chunk = max(1, STORE_BYTES // (rows.shape[1] * token_bytes))
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
            f"the mean loss is {mean}, so perplexity is no finite number; the model is broken or its dtype "
            "overflows"
        )
    return math.exp(mean)


@torch.no_grad()
def _window_losses(
    skeleton: Skeleton,
    rows: Tensor,
    block_done: Callable[[], None],
    note: Callable[[str], None],
) -> list[float]:
    """The mean loss of each window [N, T]; all of them pass a block before the next block is loaded."""
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
    """The mean loss of each window [N, T] over its T - 1 targets; `inputs` has passed the last block."""
    losses = []
    for part, logits in inputs.logits():
        for window, row in zip(rows[part].to(logits.device), logits, strict=True):
            losses.append(cross_entropy(row[:-1].float(), window[1:]).item())
    return losses
