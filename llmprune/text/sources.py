"""Text by name or file, for calibration and for perplexity: one place that knows where documents come from."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from llmprune.common.messages import first_line, nearest
from llmprune.hub.download import retrying
from llmprune.text.files import (
    Document,
    Render,
    check_file,
    document_of,
    file_documents,
    file_path,
    is_file,
    split_column,
    written,
)

__all__ = [
    "Document",
    "Render",
    "calibration_text",
    "check_calibration",
    "evaluation_text",
    "file_documents",
    "file_path",
    "is_file",
]


@dataclass(frozen=True)
class HubText:
    """A hub dataset under a short name: what to load for calibration and for evaluation."""

    dataset: str
    config: str | None
    column: str | None  # None: `text`, or a column of chats
    calibration: tuple[str, str | None]  # split, data file
    evaluation: tuple[str, str | None] | None
    joined_by: str = "\n\n"
    evaluation_documents: int | None = None


HUB_TEXTS = {
    # The shards and the 1100 validation documents joined by spaces are those of the papers' code.
    "c4": HubText(
        "allenai/c4",
        None,
        "text",
        ("train", "en/c4-train.00000-of-01024.json.gz"),
        ("validation", "en/c4-validation.00000-of-00008.json.gz"),
        " ",
        1100,
    ),
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "text", ("train", None), ("test", None)),
    "fineweb-edu": HubText("HuggingFaceFW/fineweb-edu", "sample-10BT", "text", ("train", None), None),
}


def hub_documents(
    source: str, evaluation: bool, seed: int = 0, render: Render | None = None
) -> Iterator[str]:
    """Documents of a named hub text or of `dataset-id:column`, streamed; shuffled by `seed` for calibration.

    Raises:
        ValueError: an unknown name, no network, no such dataset or column; the message names a way out.
    """
    text, split, file, column = _hub_text(source, evaluation)
    order = "" if evaluation else f", shuffled by seed {seed}"
    for number, row in enumerate(_hub_rows(source, text, split, file, None if evaluation else seed), 1):
        yield document_of(row, column, f"dataset {text.dataset}{order}, row {number}", render)


def _hub_rows(
    source: str, text: HubText, split: str, file: str | None, shuffled_by: int | None
) -> Iterator[Any]:
    try:
        from datasets import load_dataset
        from huggingface_hub import HfApi

        # Without network this fails at once, where datasets would retry for long.
        retrying(lambda: HfApi().dataset_info(text.dataset, timeout=10), f"looking for {text.dataset}")
        data = load_dataset(
            text.dataset, text.config, split=split, data_files={split: file} if file else None, streaming=True
        )
        yield from data if shuffled_by is None else data.shuffle(seed=shuffled_by, buffer_size=1000)
    except Exception as error:  # network, hub and format errors share no base class
        way_out = "use built-in text (builtin) or a file (.txt, .jsonl, .parquet)"
        raise ValueError(
            f"cannot load {source!r} from the hub ({type(error).__name__}: {first_line(error)}); without network, {way_out}"
        ) from error


def _hub_text(source: str, evaluation: bool) -> tuple[HubText, str, str | None, str | None]:
    if source in HUB_TEXTS:
        text = HUB_TEXTS[source]
        chosen = text.evaluation if evaluation else text.calibration
        if chosen is None:
            raise ValueError(f"{source!r} has no evaluation split; use wikitext2, c4, builtin or a text file")
        return text, *chosen, text.column
    dataset, column = split_column(source)
    if "/" not in dataset:
        own = ["builtin"] if evaluation else ["builtin", "self"]
        raise nearest(
            "text source",
            source,
            [*HUB_TEXTS, *own, "FILE.txt", "FILE.jsonl", "FILE.parquet", "hub/dataset:column"],
        )
    text = HubText(dataset, None, column, ("train", None), ("test", None))
    return text, "test" if evaluation else "train", None, text.column


def calibration_text(
    source: str, seed: int, render: Render | None = None
) -> tuple[Callable[[], Iterator[Document]], bool]:
    """How to get the documents of a calibration source, and whether the text is finite (a file) or streamed (the hub)."""
    if is_file(source):
        return lambda: file_documents(source, render), True
    return lambda: hub_documents(source, evaluation=False, seed=seed, render=render), False


def check_calibration(source: str) -> None:
    """Raise `ValueError` for a file that is missing or no text, or a name that is no text source, before all is read or downloaded."""
    if is_file(source):
        check_file(source)
    else:
        _hub_text(source, evaluation=False)


def evaluation_text(source: str) -> Iterator[str]:
    """The text of an evaluation source in pieces, its documents joined as the papers' code does.

    Raises:
        ValueError: it cannot be had, or there is none.
    """
    known, documents = HUB_TEXTS.get(source), _evaluation_documents(source)
    some = itertools.islice(documents, known.evaluation_documents if known else None)
    pieces = written(_joined(some, known.joined_by if known else "\n\n"), source)
    if pieces is None:
        raise ValueError(f"{source} holds no text; name another file or text")
    return pieces


def _evaluation_documents(source: str) -> Iterable[Document]:
    if source == "builtin":
        from llmprune.demo.text import held_out_documents

        return held_out_documents()
    return file_documents(source) if is_file(source) else hub_documents(source, evaluation=True)


def _joined(documents: Iterable[Document], by: str) -> Iterator[str]:
    for number, document in enumerate(documents):
        if number:
            yield by
        if isinstance(document, str):
            yield document
        else:
            yield from document
