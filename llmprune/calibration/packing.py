"""Documents become rows of real tokens: no padding, the tokenizer as it came. N rows, T tokens."""

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
_SPREAD = 8  # a finite source is packed into up to this many times the rows asked for, then drawn from


def _batches(documents: Iterable[Document]) -> Iterator[list[str] | Document]:
    """Short documents in batches that are tokenised together, long ones alone; empty ones are left out."""
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
    seed: int,
    finite: bool,
    source: str,
) -> Tensor:
    """Token rows int64 [N, T]: documents tokenised as the tokenizer does by default, laid end to end, cut into rows.

    From a finite source the rows are drawn at random (seeded) out of up to 8 N, and no more is read; from a stream the first N are taken.
    Raises `ValueError` when there is too little text, with what there is.
    """
    name = f"calibration source {source!r}"
    wanted = samples * (_SPREAD if finite else 1) * length
    tokens = first_tokens(_token_stream(documents, tokenizer, name), wanted)
    if tokens is None:
        raise ValueError(f"{name} holds no text; name another with --calibration")
    check_made(tokens, tokenizer, name)
    available = min(len(tokens), wanted) // length
    if available < samples:
        fewer = f", fewer rows (--samples {available})" if available else ""
        raise ValueError(
            f"{name} holds {len(tokens)} tokens, {available} rows of {length}, and {samples} are wanted; "
            f"give more text{fewer} or shorter rows (--seqlen)"
        )
    rows = tokens[: available * length].view(available, length)
    if not finite:
        return rows
    chosen = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:samples]
    return rows[chosen.sort().values].contiguous()
