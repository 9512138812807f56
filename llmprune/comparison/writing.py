"""Writes a comparison into a folder: page, tables, plots, and all of it as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from llmprune.checkpoint.contents import REPORT
from llmprune.checkpoint.files import write_durably
from llmprune.common.messages import shown
from llmprune.comparison import tables
from llmprune.comparison.comparing import Comparison
from llmprune.comparison.page import comparison_page
from llmprune.comparison.plots import plot

COMPARISON, TABLE, SHEET = "compare.json", "table.md", "table.csv"
PLOTS = {"sparsity": "by-sparsity.png", "bytes": "by-bytes.png"}
FILES = (COMPARISON, TABLE, SHEET, REPORT, *PLOTS.values())


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raise `ValueError` where a comparison cannot be written: only one of ours is replaced."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output {shown(str(folder))} is a file; name a folder")
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    others = [name for name in found if name not in FILES]
    if others:
        raise ValueError(
            f"output folder {shown(str(folder))} holds {others[0]}, which no comparison writes; "
            "name another with --output"
        )
    if found and not overwrite:
        raise ValueError(
            f"output folder {shown(str(folder))} is not empty; "
            "choose another with --output or replace it with --overwrite"
        )


def write(folder: Path, comparison: Comparison, version: str) -> None:
    """Write a comparison into a folder that `check_folder` accepted; each file is written completely or not
    at all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for across, name in PLOTS.items():
        picture = plot(comparison, across)
        if picture is None:
            (folder / name).unlink(missing_ok=True)  # of an earlier comparison
        else:
            write_durably(folder / name, [picture])
    texts = {
        TABLE: tables.markdown(comparison),
        SHEET: tables.as_csv(comparison),
        REPORT: comparison_page(comparison, version),
        COMPARISON: json.dumps(comparison, indent=1) + "\n",
    }
    for name, text in texts.items():
        write_durably(folder / name, [text.encode()])
