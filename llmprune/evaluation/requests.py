"""Estimates how many forward passes zero-shot tasks will need, from a sample of their documents."""

from __future__ import annotations

from typing import Any

_SAMPLE = 8  # documents looked at per task
# Tasks with one pass over a text per request. How long generated text will be is not known beforehand.
_COUNTED = ("multiple_choice", "loglikelihood")


def requests_of(loaded: Any, tokenizer: Any, limit: int | None) -> list[tuple[int, int]] | None:
    """How many requests each task makes, and how many tokens a request has on average.

    Args:
        loaded: what `load_tasks` returned.
        limit: at most so many documents per task; None for all.

    Returns:
        (requests, tokens) per task; None where that cannot be known for one of them.
    """
    try:
        sizes = [_size(task, tokenizer, limit) for task in loaded["tasks"].values()]
    except Exception:  # the user's own task files may raise anything, and an estimate must not end a run
        return None
    return None if None in sizes else [size for size in sizes if size is not None]


def _size(task: Any, tokenizer: Any, limit: int | None) -> tuple[int, int] | None:
    if task.OUTPUT_TYPE not in _COUNTED:
        return None
    documents = task.eval_docs
    count = min(len(documents), limit or len(documents))
    sampled = [documents[i * len(documents) // _SAMPLE] for i in range(min(_SAMPLE, len(documents)))]
    lengths = []
    for document in sampled:
        made = task.construct_requests(document, task.doc_to_text(document))
        for request in made if isinstance(made, list) else [made]:
            text = "".join(map(str, request.args))
            lengths.append(len(tokenizer(text, add_special_tokens=False)["input_ids"]))
    shots = 1 + int(task.config.num_fewshot or 0)
    return count * len(lengths) // len(sampled), max(1, shots * sum(lengths) // len(lengths))
