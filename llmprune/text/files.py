"""Reads the documents of text files: `.txt`, `.jsonl` (either also as `.gz`) and `.parquet`.

Files are read in steps of bounded size, so that a file larger than memory can be used. A file that holds no
text (an archive, an image, a program) is recognised by its first bytes and refused.
"""

from __future__ import annotations

import codecs
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmprune.common.messages import first_line, shown

SUFFIXES = (".txt", ".jsonl", ".parquet")
CHAT_COLUMNS = ("messages", "conversations")  # used where a row has no `text` and chats can be rendered
LONGEST_ROW = 1 << 24  # characters allowed in a line of .jsonl, or in a document of a .parquet
_LONGEST_BLANK = 1 << 20  # characters of white space a text may begin with
_READ = 1 << 16  # characters of a .txt that are read at once
_HEAD = 1 << 13  # bytes looked at to tell whether a file is text
_BATCH = 1 << 24  # bytes of .parquet rows that are decoded at once
_SURROGATE = re.compile("[\ud800-\udfff]")
Render = Callable[[list[Any], str], str]  # (messages of a chat, its place for error messages) -> its text
Document = str | Iterator[str]  # a text, or the pieces of a text that is not held in memory as a whole

_KINDS = {
    b"\x1f\x8b": "gzip data (name it .gz)",
    b"PK\x03\x04": "a zip archive",
    b"PAR1\x15": "a parquet file (name it .parquet)",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x7fELF": "a program",
    b"%PDF-": "a PDF",
    b"GGUF": "a GGUF model",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"\xfd7zXZ": "xz data",
    b"BZh": "bzip2 data",
    b"\x28\xb5\x2f\xfd": "zstd data",
    b"7z\xbc\xaf": "a 7z archive",
    b"ARROW1": "an Arrow file",
    b"SQLite format 3": "a database",
    b"\xff\xfe": "UTF-16 text (convert it to UTF-8)",
    b"\xfe\xff": "UTF-16 text (convert it to UTF-8)",
}


def is_file(source: str) -> bool:
    """Whether a source names a text file, judged by its ending without `:column`."""
    return split_column(source)[0].removesuffix(".gz").endswith(SUFFIXES)


def file_path(source: str) -> Path:
    """The path of the file that a source names, without `:column`."""
    return Path(split_column(source)[0])


def split_column(source: str) -> tuple[str, str | None]:
    """Split `SOURCE:column` into source and column; the column is None where none is named."""
    head, colon, tail = source.rpartition(":")
    return (head, tail) if colon and "/" not in tail and "." not in tail and len(head) > 1 else (source, None)


def check_file(source: str) -> None:
    """Raise `ValueError` for a text file that does not exist or whose first bytes are not text."""
    path = file_path(source)
    if not path.is_file():
        raise ValueError(f"no such text file: {path}")
    if path.name.removesuffix(".gz").endswith(".parquet"):
        return  # pyarrow checks the file itself
    head = next(_naming_file(path, _head(path)))
    if kind := _binary(head):
        raise ValueError(
            f"cannot read {path}: it is {kind}; calibration and evaluation take UTF-8 text in .txt, .jsonl "
            "or .parquet"
        )


def _head(path: Path) -> Iterator[bytes]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as handle:
        yield handle.read(_HEAD)


def _binary(head: bytes) -> str | None:
    """The kind of a file that is not text, judged by its first bytes; None for text."""
    known = next((kind for magic, kind in _KINDS.items() if head.startswith(magic)), None)
    if b"\0" in head:
        return known or "binary (zero bytes among its first)"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError as error:
        return known or f"not UTF-8 (byte 0x{head[error.start]:02x} at {error.start})"
    return known if known and re.search(rb"[\x01-\x08\x0e-\x1a\x1c-\x1f]", head) else None


def file_documents(source: str, render: Render | None = None) -> Iterator[Document]:
    """The documents of a text file.

    Args:
        source: path of a `.txt` file (one document, read in pieces), or of a `.jsonl` or `.parquet` file (one
            document per row). `FILE:column` names the column of text, by default `text`.
        render: turns the messages of a chat into text. With it, a column may hold chats, and where there is
            no column `text` one of `CHAT_COLUMNS` is used. None: chats are refused.

    Raises:
        ValueError: the file is missing, damaged, not text, or lacks the column.
    """
    check_file(source)
    name, column = split_column(source)
    path = Path(name)
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "txt":
        yield _naming_file(path, _pieces(path))
    else:
        yield from _naming_file(path, {"jsonl": _jsonl, "parquet": _parquet}[kind](path, column, render))


def _naming_file(path: Path, items: Iterator[Any]) -> Iterator[Any]:
    """The items; an error in reading them becomes a `ValueError` that names the file."""
    try:
        yield from items
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(
            f"cannot read {path}: it is not UTF-8 throughout (byte 0x{byte:02x}); convert it to UTF-8"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {path}: {error}") from None


def _open(path: Path) -> Any:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def _pieces(path: Path) -> Iterator[str]:
    with _open(path) as handle:
        while piece := handle.read(_READ):
            yield piece


def written(document: Document, name: str) -> Iterator[str] | None:
    """The pieces of a document, or None for a document of white space alone.

    Raises:
        ValueError: it begins with more than `_LONGEST_BLANK` characters of white space.
    """
    pieces = iter([document]) if isinstance(document, str) else document
    blank: list[str] = []
    for piece in pieces:
        blank.append(piece)
        if piece and not piece.isspace():
            return itertools.chain(blank, pieces)
        if sum(map(len, blank)) > _LONGEST_BLANK:
            raise ValueError(
                f"{name} begins with more than {_LONGEST_BLANK:,} characters of white space; remove them or "
                "name another text"
            )
    return None


def _jsonl(path: Path, column: str | None, render: Render | None) -> Iterator[str]:
    with _open(path) as handle:
        for number in itertools.count(1):
            line = handle.readline(LONGEST_ROW + 1)
            if not line:
                return
            where = f"{path}, line {number}"
            if len(line) > LONGEST_ROW:
                raise ValueError(
                    f"{where} is longer than {LONGEST_ROW:,} characters; a .jsonl file holds a document per "
                    "line"
                )
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is not JSON: {error}") from None
            yield document_of(row, column, where, render)


def _columns(column: str | None, render: Render | None) -> tuple[str, ...]:
    """The columns that may hold the document, in the order in which they are tried."""
    if column:
        return (column,)
    return ("text", *CHAT_COLUMNS) if render else ("text",)


def document_of(row: Any, column: str | None, where: str, render: Render | None) -> str:
    """The document of a row; `where` names the row. Raises `ValueError` where it holds no text."""
    names = _columns(column, render)
    fields = row if isinstance(row, dict) else {}
    found = next((name for name in names if fields.get(name) is not None), None)
    if found is None and names[0] in fields:
        raise ValueError(
            f"{where} is empty (null) in column {names[0]!r}; mend or remove the row, or name another "
            "column as SOURCE:column"
        )
    if found is None:
        have = ", ".join(sorted(map(str, row))) if isinstance(row, dict) else type(row).__name__
        raise ValueError(
            f"{where} has no text column {names[0]!r} (it has: {have}); name it as SOURCE:column"
        )
    value = fields[found]
    if render and isinstance(value, list):
        value = render(value, where)
    if not isinstance(value, str):
        kind = type(value).__name__
        raise ValueError(
            f"{where} has {'an' if kind[0] in 'aeiou' else 'a'} {kind} in column {found!r} instead of text: "
            f"{shown(value)}; mend or remove the row, or name a column of text as SOURCE:column"
        )
    if len(value) > LONGEST_ROW:
        raise ValueError(
            f"{where} is longer than {LONGEST_ROW:,} characters; split it into documents, or give it as a "
            ".txt file"
        )
    return whole_characters(value, where)


def whole_characters(text: str, where: str) -> str:
    """The text, checked to hold no half of a surrogate pair (JSON can encode one, but no tokenizer takes it).

    Raises:
        ValueError: it holds one; `where` names the text in the message.
    """
    if not text.isascii() and (half := _SURROGATE.search(text)):
        raise ValueError(
            f"{where} has half a character, \\u{ord(half[0]):04x}, after {half.start()} others (a surrogate "
            "without its pair), which no tokenizer takes; mend or remove the row"
        )
    return text


def _parquet(path: Path, column: str | None, render: Render | None) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, buffer_size=1 << 20) as table:
            wanted, have = _columns(column, render), table.schema_arrow.names
            if not set(wanted) & set(have):
                raise ValueError(
                    f"{path} has no text column {wanted[0]!r} (it has: {', '.join(have)}); name it as "
                    "SOURCE:column"
                )
            columns = [name for name in wanted if name in have]
            batches = table.iter_batches(batch_size=_rows_at_once(table.metadata), columns=columns)
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, row in enumerate(rows, 1):
                yield document_of(row, column, f"{path}, row {number}", render)
    except pa.ArrowException as error:
        raise ValueError(f"cannot read {path}: {first_line(error)}") from None


def _rows_at_once(table: Any) -> int:
    """How many rows of a .parquet file are decoded together: 256, fewer where rows are long."""
    size = sum(table.row_group(number).total_byte_size for number in range(table.num_row_groups))
    return int(max(1, min(256, _BATCH * table.num_rows // max(1, size))))
