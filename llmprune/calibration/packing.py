"""Packs documents into calibration rows: tokenised, laid end to end, cut, no padding. N rows, T tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from llmprune.calibration.chat import Templated
from llmprune.text import tokenisation
from llmprune.text.files import Document, written
from llmprune.text.tokenisation import Ids, check_made, encoded, first_tokens, ids_of, tokens_of

_BATCH = 64  # documents tokenised together
_SPREAD = 8  # from a finite source, rows are drawn out of up to this many times as many


class Shortage(Exception):
    """The cause of a `ValueError` for a text that is too short: `tokens` are what it holds."""

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens)
        self.tokens = tokens


def _batches(documents: Iterable[Document]) -> Iterator[list[str] | Document]:
    """Short documents in batches that are tokenised together, long ones alone; empty ones are left out.

    A batch holds either texts of chat templates or other texts, since only the latter get special tokens.
    """
    batch: list[str] = []
    size = 0
    for document in documents:
        if not isinstance(document, str) or len(document) > tokenisation.PIECE:
            if batch:
                yield batch
                batch, size = [], 0
            yield document
        elif document.strip():
            full = len(batch) == _BATCH or size + len(document) > tokenisation.PIECE
            if batch and (full or isinstance(document, Templated) != isinstance(batch[0], Templated)):
                yield batch
                batch, size = [], 0
            batch.append(document)
            size += len(document)
    if batch:
        yield batch


def _token_stream(documents: Iterable[Document], tokenizer: Any, name: str) -> Iterator[Ids]:
    for batch in _batches(documents):
        special = not isinstance(batch[0] if isinstance(batch, list) else batch, Templated)
        if isinstance(batch, list):
            yield from (ids_of(row, name) for row in encoded(tokenizer, batch, name, special)["input_ids"])
        elif pieces := written(batch, name):
            yield from tokens_of(pieces, tokenizer, name, special)


def pack(
    documents: Iterable[Document],
    tokenizer: Any,
    samples: int,
    length: int,
    source: str,
    seed: int | None,
) -> Tensor:
    """Token rows int64 [N, T] of documents, tokenised with the tokenizer's defaults.

    Args:
        samples: how many rows (N).
        length: tokens per row (T).
        source: what error messages call the documents.
        seed: for a finite source: N rows are drawn at random out of the first 8 N, beyond which nothing is
            read. None for a stream that is shuffled already: the first N rows are taken.

    Raises:
        ValueError: there is too little text; the message says how much there is, as does its cause, a
            `Shortage`.
    """
    name = f"calibration source {source!r}"
    wanted = samples * length * (1 if seed is None else _SPREAD)
    tokens = first_tokens(_token_stream(documents, tokenizer, name), wanted)
    if tokens is None:
        raise ValueError(f"{name} holds no text; name another with --calibration") from Shortage(0)
    check_made(tokens, tokenizer, name)
    available = min(len(tokens), wanted) // length
    if available < samples:
        fewer = f", fewer rows (--samples {available})" if available else ""
        raise ValueError(
            f"{name} holds {len(tokens)} tokens, {available} rows of {length}, and {samples} are wanted; "
            f"give more text{fewer} or shorter rows (--seqlen)"
        ) from Shortage(len(tokens))
    rows = tokens[: available * length].view(available, length)
    return rows if seed is None else drawn_rows(rows, samples, seed)


def drawn_rows(rows: Tensor, samples: int, seed: int) -> Tensor:
    """`samples` of the rows [n, T], drawn at random with the seed, in the order they had."""
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:samples]
    return rows[chosen.sort().values].contiguous()
