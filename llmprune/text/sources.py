"""Finds the text that a source names (a hub dataset, `builtin`, a file), for calibration and perplexity."""

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


@dataclass(frozen=True)
class HubText:
    """A hub dataset: what to load from it for calibration and for evaluation.

    Attributes:
        column: the column of text; None for `text`, or a column of chats.
        calibration: (split, data file); a data file of None means the whole split.
        evaluation: the same for evaluation; None where the dataset has no split for it.
        joined_by: what stands between two documents when they are joined for perplexity.
        evaluation_documents: how many documents perplexity is measured on; None for all.
    """

    dataset: str
    config: str | None
    column: str | None
    calibration: tuple[str, str | None]
    evaluation: tuple[str, str | None] | None
    joined_by: str = "\n\n"
    evaluation_documents: int | None = None


HUB_TEXTS = {
    # The code of the Wanda and SparseGPT papers uses these shards, and 1100 validation documents joined by
    # spaces.
    "c4": HubText(
        dataset="allenai/c4",
        config=None,
        column="text",
        calibration=("train", "en/c4-train.00000-of-01024.json.gz"),
        evaluation=("validation", "en/c4-validation.00000-of-00008.json.gz"),
        joined_by=" ",
        evaluation_documents=1100,
    ),
    "wikitext2": HubText(
        dataset="Salesforce/wikitext",
        config="wikitext-2-raw-v1",
        column="text",
        calibration=("train", None),
        evaluation=("test", None),
    ),
    "fineweb-edu": HubText(
        dataset="HuggingFaceFW/fineweb-edu",
        config="sample-10BT",
        column="text",
        calibration=("train", None),
        evaluation=None,
    ),
}


def may_hold_chats(source: str) -> bool:
    """Whether a plain source can have chats: rows of a file or of a hub dataset without a set column."""
    if is_file(source):
        return not file_path(source).name.removesuffix(".gz").endswith(".txt")
    return "/" in source and not source.endswith(".safetensors")


def hub_documents(
    source: str, evaluation: bool, seed: int = 0, render: Render | None = None
) -> Iterator[str]:
    """The documents of a hub dataset, streamed; for calibration in an order shuffled with the seed.

    Args:
        source: a name of `HUB_TEXTS`, or `dataset-id:column`.
        evaluation: take the evaluation split, in its own order, instead of the calibration split.
        render: turns chats into text, see `file_documents`.

    Raises:
        ValueError: an unknown name, no network, no such dataset or column.
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

        # Without network this request fails at once; `datasets` would retry for minutes.
        retrying(lambda: HfApi().dataset_info(text.dataset, timeout=10), f"looking for {text.dataset}")
        data = load_dataset(
            text.dataset, text.config, split=split, data_files={split: file} if file else None, streaming=True
        )
        yield from data if shuffled_by is None else data.shuffle(seed=shuffled_by, buffer_size=1000)
    except Exception as error:  # network, hub and format errors share no base class
        way_out = "use built-in text (builtin) or a file (.txt, .jsonl, .parquet)"
        raise ValueError(
            f"cannot load {source!r} from the hub ({type(error).__name__}: {first_line(error)}); without "
            f"network, {way_out}"
        ) from error


def _hub_text(source: str, evaluation: bool) -> tuple[HubText, str, str | None, str | None]:
    """Dataset, split, data file and column of a source. Raises `ValueError` for an unknown name."""
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
    """A function that opens the documents of a calibration source, and whether they are finite.

    A file is finite, so rows can be drawn from all of it; a hub dataset is a shuffled stream, from which the
    first rows are taken.
    """
    if is_file(source):
        return lambda: file_documents(source, render), True
    return lambda: hub_documents(source, evaluation=False, seed=seed, render=render), False


def check_calibration(source: str) -> None:
    """Raise `ValueError` for a missing file, one that is not text, or an unknown name; downloads nothing."""
    if is_file(source):
        check_file(source)
    else:
        _hub_text(source, evaluation=False)


def evaluation_text(source: str) -> Iterator[str]:
    """The text of an evaluation source in pieces, its documents joined as in the papers' code.

    Raises:
        ValueError: the source cannot be read, or holds no text.
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
