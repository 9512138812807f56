"""Text by name or file, for calibration and for perplexity: one place that knows where documents come from."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprune.hub import retrying
from llmprune.registry import nearest

SUFFIXES = (".txt", ".jsonl", ".parquet")
CHAT_COLUMNS = ("messages", "conversations")  # read where a row has no `text` and chats can be rendered
Render = Callable[[list[Any], str], str]  # the messages of a chat and where they stand -> its text


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
        "allenai/c4", None, "text", ("train", "en/c4-train.00000-of-01024.json.gz"),
        ("validation", "en/c4-validation.00000-of-00008.json.gz"), " ", 1100,
    ),
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "text", ("train", None), ("test", None)),
    "fineweb-edu": HubText("HuggingFaceFW/fineweb-edu", "sample-10BT", "text", ("train", None), None),
}  # fmt: skip


def is_file(source: str) -> bool:
    """Whether a source names a text file (by its ending, `:column` aside)."""
    return _split_column(source)[0].removesuffix(".gz").endswith(SUFFIXES)


def file_path(source: str) -> Path:
    """The file of a source that may carry a `:column`."""
    return Path(_split_column(source)[0])


def _split_column(source: str) -> tuple[str, str | None]:
    head, colon, tail = source.rpartition(":")
    return (head, tail) if colon and "/" not in tail and "." not in tail and len(head) > 1 else (source, None)


def file_documents(source: str, render: Render | None = None) -> Iterator[str]:
    """Documents of a `.txt` (one), `.jsonl` or `.parquet` file; `FILE:column` names the text column, `text` by default.

    With `render`, a column may hold chats, and one of `CHAT_COLUMNS` stands in for a missing `text`.

    Raises:
        ValueError: no such file, damaged, or without the column.
    """
    name, column = _split_column(source)
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"no such text file: {name}")
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    reader = {"txt": _text, "jsonl": _jsonl, "parquet": _parquet}[kind]
    try:
        yield from reader(path, column, render)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {name}: {error}") from None


def _open(path: Path) -> Any:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def _text(path: Path, column: str | None, render: Render | None) -> Iterator[str]:
    with _open(path) as handle:
        yield handle.read()


def _jsonl(path: Path, column: str | None, render: Render | None) -> Iterator[str]:
    with _open(path) as handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
            yield _document(row, column, f"{path}, line {number}", render)


def _columns(column: str | None, render: Render | None) -> tuple[str, ...]:
    """The columns a document may stand in, the likeliest first."""
    return (column,) if column else ("text", *CHAT_COLUMNS) if render else ("text",)


def _document(row: Any, column: str | None, where: str, render: Render | None) -> str:
    names = _columns(column, render)
    value = next((row[name] for name in names if row.get(name) is not None), None) if isinstance(row, dict) else None
    if isinstance(value, str):
        return value
    if render and isinstance(value, list):
        return render(value, where)
    have = ", ".join(sorted(map(str, row))) if isinstance(row, dict) else type(row).__name__
    raise ValueError(f"{where} has no text column {names[0]!r} (it has: {have}); name it as SOURCE:column")


def _parquet(path: Path, column: str | None, render: Render | None) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            wanted, have = _columns(column, render), table.schema_arrow.names
            if not set(wanted) & set(have):
                raise ValueError(f"{path} has no text column {wanted[0]!r} (it has: {', '.join(have)}); name it as SOURCE:column")
            batches = table.iter_batches(batch_size=256, columns=[name for name in wanted if name in have])
            for number, row in enumerate(itertools.chain.from_iterable(batch.to_pylist() for batch in batches), 1):
                yield _document(row, column, f"{path}, row {number}", render)
    except pa.ArrowException as error:
        raise ValueError(f"cannot read {path}: {str(error).splitlines()[0]}") from None


def hub_documents(source: str, evaluation: bool, seed: int = 0, render: Render | None = None) -> Iterator[str]:
    """Documents of a named hub text or of `dataset-id:column`, streamed; shuffled by `seed` for calibration.

    Raises:
        ValueError: an unknown name, no network, no such dataset or column; the message names a way out.
    """
    text, split, file, column = _hub_text(source, evaluation)
    way_out = "use built-in text (builtin) or a file (.txt, .jsonl, .parquet)"
    try:
        from datasets import load_dataset
        from huggingface_hub import HfApi

        # Without network this fails at once, where datasets would retry for long.
        retrying(lambda: HfApi().dataset_info(text.dataset, timeout=10), f"looking for {text.dataset}")
        data = load_dataset(text.dataset, text.config, split=split, data_files={split: file} if file else None, streaming=True)
        rows = iter(data if evaluation else data.shuffle(seed=seed, buffer_size=1000))
        first = next(rows, None)
    except Exception as error:  # network, hub and format errors share no base class
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"cannot load {source!r} from the hub ({type(error).__name__}: {line}); without network, {way_out}") from error
    order = "" if evaluation else f", shuffled by seed {seed}"
    for number, row in enumerate(itertools.chain([] if first is None else [first], rows), 1):
        yield _document(row, column, f"dataset {text.dataset}{order}, row {number}", render)


def _hub_text(source: str, evaluation: bool) -> tuple[HubText, str, str | None, str | None]:
    if source in HUB_TEXTS:
        text = HUB_TEXTS[source]
        chosen = text.evaluation if evaluation else text.calibration
        if chosen is None:
            raise ValueError(f"{source!r} has no evaluation split; use wikitext2, c4, builtin or a text file")
        return text, *chosen, text.column
    dataset, column = _split_column(source)
    if "/" not in dataset:
        own = ["builtin"] if evaluation else ["builtin", "self"]
        raise nearest("text source", source, [*HUB_TEXTS, *own, "FILE.txt", "FILE.jsonl", "FILE.parquet", "hub/dataset:column"])
    text = HubText(dataset, None, column, ("train", None), ("test", None))
    return text, "test" if evaluation else "train", None, text.column


def calibration_text(source: str, seed: int, render: Render | None = None) -> tuple[Callable[[], Iterator[str]], bool]:
    """How to get the documents of a calibration source, and whether the text is finite (a file) or streamed (the hub)."""
    if is_file(source):
        return lambda: file_documents(source, render), True
    return lambda: hub_documents(source, evaluation=False, seed=seed, render=render), False


def check_calibration(source: str) -> None:
    """Raise `ValueError` for a missing file or a name that is no text source, before anything is read or downloaded."""
    if not is_file(source):
        _hub_text(source, evaluation=False)
    elif not file_path(source).is_file():
        raise ValueError(f"no such text file: {file_path(source)}")


def evaluation_text(source: str) -> str:
    """The whole text of an evaluation source, its documents joined as the papers' code does."""
    if source == "builtin":
        from llmprune.demo.text import held_out_documents

        text = "\n\n".join(held_out_documents())
    elif is_file(source):
        text = "\n\n".join(file_documents(source))
    else:
        known = HUB_TEXTS.get(source)
        documents = hub_documents(source, evaluation=True)
        text = (known.joined_by if known else "\n\n").join(itertools.islice(documents, known.evaluation_documents if known else None))
    if not text.strip():
        raise ValueError(f"{source} holds no text; name another file or text")
    return text
