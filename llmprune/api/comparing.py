"""The Python function `compare`: several runs side by side."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprune.api.arguments import AnyPath, checked
from llmprune.api.notebook import data_frame, html_table
from llmprune.checkpoint.contents import RECORD
from llmprune.checkpoint.reader import read_record
from llmprune.checkpoint.replacement import input_files
from llmprune.checkpoint.sweep_folder import CELLS, read_sweep
from llmprune.common.messages import shown
from llmprune.common.version import __version__
from llmprune.comparison import tables, writing
from llmprune.comparison.comparing import compared
from llmprune.comparison.entries import Entry, names_of
from llmprune.hub.download import download
from llmprune.record.sweeps import DONE
from llmprune.record.sweeps import names_of as names_of_cells


@dataclass(frozen=True, repr=False)
class Comparison:
    """Several runs side by side. Printed, it is their table.

    Attributes:
        record: everything, as plain values; see `compare`.
        output: the folder with page, tables and plots; None where none was asked for.
    """

    record: dict[str, Any]
    output: Path | None = None

    def __repr__(self) -> str:
        return tables.markdown(self.record)

    def _repr_html_(self) -> str:
        head, rows = tables.cells(self.record)
        return html_table("; ".join([tables.title(self.record), *tables.notes(self.record)]), rows, head)

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with a row per run.

        Raises:
            ValueError: pandas is not installed.
        """
        return data_frame(tables.plain_rows(self.record), tables.columns(self.record))


@checked()
def compare(
    paths: AnyPath | Sequence[AnyPath],
    *,
    output: AnyPath | None = None,
    overlap: bool = True,
    overwrite: bool = False,
    revision: str | None = None,
) -> Comparison:
    """Put several runs side by side: scores, sizes, speed and time, what differs, and how masks overlap.

    Only figures of the same dense model and the same protocol are ranked.

    Args:
        paths: output folders of `prune`, `run_model` or `recover`, of `sweep` (all its cells), or hub ids.
        output: a folder for the page (`report.html`), tables (`table.md`, `table.csv`), plots and
            `compare.json`; None to write nothing.
        overlap: whether the overlap of the masks is counted, for which all are read.
        overwrite: replace a comparison that is there.
        revision: branch, tag or commit of the hub ids.

    Returns:
        A `Comparison`, whose `record` has `runs`, `scores` (groups of figures that may be ranked, with the
        best of each), `unranked`, `differences`, `overlap` and `published`.

    Raises:
        ValueError: a folder that holds no run, the same one twice, or an output that may not be replaced.
    """
    named = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    target = None if output is None else Path(output).expanduser()
    if target is not None:
        runs = input_files([("a run that is compared", place) for place in named])
        writing.check_folder(target, overwrite, runs)
    entries = entries_at(named, revision)
    found = compared(entries, overlap, [told for place in named for told in _unfinished(Path(place))])
    if target is not None:
        writing.write(target, found, __version__)
    return Comparison(found, target)


def entries_at(places: Sequence[AnyPath], revision: str | None = None) -> list[Entry]:
    """The runs in some folders, or of some hub ids."""
    local, remote = [], []
    for place in places:
        folder = Path(place).expanduser()
        if folder.is_dir():
            local += list(_runs_in(folder))
        elif isinstance(place, str) and place.count("/") == 1 and not place.startswith((".", "/", "~")):
            remote.append(Entry(place, read_record(download(place, revision, False, weights=False))))
        else:
            what = "this is a file, no folder" if folder.is_file() else "no such folder"
            raise ValueError(f"{what}: {shown(str(place))}; name output folders of llmprune, or hub ids")
    whole = [folder.resolve() for folder in local]
    keys, given = [*map(str, whole), *(e.name for e in remote)], [*map(str, local), *(e.name for e in remote)]
    twice = next((said for key, said in zip(keys, given, strict=True) if keys.count(key) > 1), None)
    if twice is not None:
        raise ValueError(f"{shown(twice)} is named twice; name each run once")
    names = names_of(whole)
    return [Entry(name, read_record(at), at) for name, at in zip(names, local, strict=True)] + remote


def _unfinished(folder: Path) -> list[str]:
    """A sentence on the cells of a sweep that are not finished."""
    at = folder.expanduser()
    swept = read_sweep(at) if at.is_dir() and not (at / RECORD).is_file() else None
    cells = swept["cells"] if swept else []
    left = [cell["name"] for cell in cells if cell["status"] != DONE]
    if not left:
        return []
    return [f"{len(left)} of {len(cells)} cells of {folder.name} are not finished: {', '.join(left)}"]


def _runs_in(folder: Path) -> Iterator[Path]:
    """The folder of a run, or of every finished cell of a sweep."""
    if (folder / RECORD).is_file():
        yield folder
        return
    swept = read_sweep(folder)
    done = names_of_cells(swept["cells"], DONE) if swept else []
    yield from (folder / CELLS / name for name in done)
    if done:
        return
    raise ValueError(
        f"{shown(str(folder))} holds no {RECORD}, so it is no finished run of llmprune; name another folder"
    )
