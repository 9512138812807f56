"""What results are in a notebook: tables in HTML, and data frames of pandas where it is installed."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any


def html_table(title: str, rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """A table in HTML; everything in it is escaped."""

    def line(tag: str, cells: Iterable[str]) -> str:
        inner = "".join(f'<{tag} style="text-align:left">{html.escape(str(cell))}</{tag}>' for cell in cells)
        return f"<tr>{inner}</tr>"

    top = line("th", head) if head else ""
    body = "".join(line("td", row) for row in rows)
    return f"<table><caption>{html.escape(title)}</caption>{top}{body}</table>"


def data_frame(rows: Iterable[Any], columns: Sequence[str] | None = None) -> Any:
    """Rows as a `pandas.DataFrame`.

    Args:
        rows: mappings, or cells under `columns`.

    Raises:
        ValueError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise ValueError("to_pandas needs pandas, which is not installed: pip install pandas") from None
    return pandas.DataFrame(list(rows), columns=columns and list(columns))
