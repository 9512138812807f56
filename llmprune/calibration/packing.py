"""Documents become rows of real tokens: no padding, the tokenizer as it came. N rows, T tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from llmprune.calibration.chat import Templated

_BATCH = 64  # documents tokenised together
_SPREAD = 8  # a finite source is packed into up to this many times the rows asked for, then drawn from


def _token_stream(documents: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    written = (document for document in documents if document.strip())
    for templated, alike in itertools.groupby(written, key=lambda document: isinstance(document, Templated)):
        while batch := list(itertools.islice(alike, _BATCH)):
            yield from (tokenizer(batch, add_special_tokens=False) if templated else tokenizer(batch))["input_ids"]


def pack(documents: Iterable[str], tokenizer: Any, samples: int, length: int, seed: int, finite: bool, source: str) -> Tensor:
    """Token rows int64 [N, T]: documents tokenised as the tokenizer does by default, laid end to end, cut into rows.

    From a finite source the rows are drawn at random (seeded) out of up to 8 N; from a stream the first N are taken.
    Raises `ValueError` when there is too little text, with what there is.
    """
    wanted = samples * (_SPREAD if finite else 1) * length
    tokens: list[int] = []
    for row in _token_stream(documents, tokenizer):
        tokens.extend(row)
        if len(tokens) >= wanted:
            break
    available = min(len(tokens), wanted) // length
    if not tokens:
        raise ValueError(f"calibration source {source!r} holds no text; name another with --calibration")
    if available < samples:
        fewer = f", fewer rows (--samples {available})" if available else ""
        raise ValueError(
            f"calibration source {source!r} holds {len(tokens)} tokens, {available} rows of {length}, and {samples} are wanted; "
            f"give more text{fewer} or shorter rows (--seqlen)"
        )
    rows = torch.tensor(tokens[: available * length], dtype=torch.int64).view(available, length)
    if not finite:
        return rows
    chosen = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:samples]
    return rows[chosen.sort().values].contiguous()
