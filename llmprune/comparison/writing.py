"""Writes a comparison into a folder: page, tables, plots, and all of it as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from llmprune.checkpoint.contents import REPORT
from llmprune.checkpoint.files import write_durably
from llmprune.checkpoint.replacement import Inputs, check_target
from llmprune.common.messages import shown
from llmprune.comparison import tables
from llmprune.comparison.comparing import Comparison
from llmprune.comparison.page import comparison_page
from llmprune.comparison.plots import plot

COMPARISON, TABLE, SHEET, PAGE = "compare.json", "table.md", "table.csv", REPORT
PLOTS = {"sparsity": "by-sparsity.png", "bytes": "by-bytes.png"}
FILES = (COMPARISON, TABLE, SHEET, PAGE, *PLOTS.values())


def check_folder(folder: Path, overwrite: bool, inputs: Inputs) -> None:
    """Raise `ValueError` where a comparison cannot be written: only one of ours is replaced.

    Args:
        folder: to write.
        overwrite: whether a comparison that is there may be replaced.
        inputs: the folders that are compared, which must not be written.
    """
    check_target(folder, inputs)
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if not found:
        return
    foreign = [name for name in found if name.removesuffix(".tmp") not in FILES]
    if foreign or not _is_ours(folder / COMPARISON):
        raise ValueError(
            f"output folder {shown(str(folder))} holds {(foreign or found)[0]}, which no comparison has "
            "written; name another with --output"
        )
    if not overwrite:
        raise ValueError(
            f"output folder {shown(str(folder))} is not empty; "
            "choose another with --output or replace it with --overwrite"
        )


def _is_ours(path: Path) -> bool:
    """Whether a file is the record of a comparison, which is written first."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and {"schema", "runs", "unranked"} <= record.keys()


def write(folder: Path, comparison: Comparison, version: str) -> None:
    """Write a comparison into a folder that `check_folder` accepted; each file is written completely or not
    at all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        COMPARISON: json.dumps(comparison, indent=1) + "\n",  # first: it says whose the folder is
        TABLE: tables.markdown(comparison),
        SHEET: tables.as_csv(comparison),
        PAGE: comparison_page(comparison, version),
    }
    for name, text in texts.items():
        write_durably(folder / name, [text.encode()])
    for across, name in PLOTS.items():
        picture = plot(comparison, across)
        if picture is None:
            (folder / name).unlink(missing_ok=True)  # of an earlier comparison
        else:
            write_durably(folder / name, [picture])
