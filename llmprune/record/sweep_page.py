"""The page of a sweep."""

from __future__ import annotations

import base64
import html

from llmprune.record.figures import Record
from llmprune.record.sweep_table import tables_of


def html_page(record: Record, drawn: bytes | None) -> str:
    """One page with the tables and the plot; `drawn` is a PNG."""
    title = html.escape(f"Sweep of {record['model']['source']}")
    parts = [f"<h1>{title}</h1>"]
    for table in tables_of(record):
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in ("", *table.methods))
        rows = "".join(
            f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows
        )
        parts.append(f"<h2>{html.escape(table.title)}</h2><table><tr>{head}</tr>{rows}</table>")
    if drawn is not None:
        parts.append(f'<img alt="plot" src="data:image/png;base64,{base64.b64encode(drawn).decode()}">')
    return f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title></head><body>{''.join(parts)}</body></html>\n"
