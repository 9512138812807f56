"""How much zero-shot tasks will ask of a model, told from a few of their documents before any of them is run."""

from __future__ import annotations

from typing import Any

_SAMPLE = 8  # documents looked at per task
_COUNTED = (
    "multiple_choice",
    "loglikelihood",
)  # one pass over a text per request; generating has no length known before


def requests_of(loaded: Any, tokenizer: Any, limit: int | None) -> list[tuple[int, int]] | None:
    """(requests, tokens of each) per task of those that `load_tasks` loaded; None where lm-eval does not tell for one of them."""
    try:
        sizes = [_size(task, tokenizer, limit) for task in loaded["tasks"].values()]
    except Exception:  # tasks are files of anyone's; an estimate is not worth a run
        return None
    return None if None in sizes else [size for size in sizes if size is not None]


def _size(task: Any, tokenizer: Any, limit: int | None) -> tuple[int, int] | None:
    if task.OUTPUT_TYPE not in _COUNTED:
        return None
    documents = task.eval_docs
    count = min(len(documents), limit or len(documents))
    lengths, sampled = (
        [],
        [documents[i * len(documents) // _SAMPLE] for i in range(min(_SAMPLE, len(documents)))],
    )
    for document in sampled:
        made = task.construct_requests(document, task.doc_to_text(document))
        for request in made if isinstance(made, list) else [made]:
            lengths.append(
                len(tokenizer("".join(map(str, request.args)), add_special_tokens=False)["input_ids"])
            )
    shots = 1 + int(task.config.num_fewshot or 0)
    return count * len(lengths) // len(sampled), max(1, shots * sum(lengths) // len(lengths))
