"""Decides which folder may be written or replaced, and removes one without touching files of anyone else.

Every folder that this program replaces or removes goes through `check_place`, `foreign_entries` and `remove`.
"Ours" are files that a run of this program wrote; everything else is foreign.
"""

from __future__ import annotations

import errno
import json
import os
import pwd
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from llmprune.checkpoint.contents import (
    CARD,
    INDEX,
    JOURNAL,
    MADE,
    MASKS,
    PAGES,
    RECORD,
    SWEEP,
    TEMPORARY,
    WRITTEN_LAST,
    is_companion,
    is_exact,
    is_shard,
)
from llmprune.common.messages import shown

Inputs = Sequence[tuple[str, Path]]  # what a run reads: its name in messages, and its path
MODEL = "the model"  # the name of that input
# Folders of the system, which are never an output. A folder
# below `_SEALED` is none either, unless it is below `_OPEN`.
_SEALED = (
    "bin",
    "boot",
    "dev",
    "etc",
    "lib",
    "lib32",
    "lib64",
    "libx32",
    "proc",
    "sbin",
    "sys",
    "usr",
    "nix",
    "System",
    "Library",
)
_MORE = (
    "home",
    "media",
    "mnt",
    "opt",
    "private",
    "root",
    "run",
    "snap",
    "srv",
    "tmp",
    "var",
    "Applications",
    "Users",
    "Volumes",
)
_OPEN = ("dev/shm", "usr/local", "usr/src")
_DERIVED = re.compile(r"\..*\.(partial|replaced|lock)", re.DOTALL)  # names that a run uses beside its output


def check_place(output: Path, inputs: Inputs) -> None:
    """Raise `ValueError` if a path must never be an output, whatever is there.

    Args:
        output: as the user gave it; links are followed.
        inputs: what the run reads. The output may not be or contain any of them, nor lie inside the model.
    """
    target = output.resolve()

    def refused(what: str) -> ValueError:
        return ValueError(
            f"output folder {output} {what}, which is never replaced; choose another with --output"
        )

    if target.parent == target:
        raise refused("is the root of the file system")
    for what, path in inputs:
        for place in {path.resolve(), Path(os.path.abspath(path))}:
            if target == place or target in place.parents:
                raise refused(f"holds {what}")
            if what == MODEL and place in target.parents:
                raise refused(f"lies in the folder of {what}")
    here = _here()
    if here is not None and target in (here, *here.parents):
        raise refused("holds the working directory")
    if any(target in (home, *home.parents) for home in _homes()):
        raise refused("holds a home folder")
    if _is_of_system(target):
        raise refused("is a folder of the system")
    if target.is_dir() and os.path.ismount(target):
        raise refused("is a mount point")


def _here() -> Path | None:
    """The working directory; None if it was removed."""
    try:
        return Path.cwd().resolve()
    except OSError:
        return None


def _homes() -> set[Path]:
    """The home folders of this machine's users, without those in system folders, which are refused anyway."""
    named = [entry.pw_dir for entry in pwd.getpwall()] + [os.environ.get("HOME", "")]
    found = {Path(name).resolve() for name in named if name.startswith("/")}
    return {home for home in found if home.parent != home and not _is_of_system(home)}


def _is_of_system(target: Path) -> bool:
    """Whether a folder belongs to the operating system."""
    root = Path(target.anchor)
    if target in {root / name for name in (*_SEALED, *_MORE, *_OPEN)} or target.name == "lost+found":
        return True
    if any(root / name in target.parents for name in _OPEN):
        return False
    return any(root / name in target.parents for name in _SEALED)


def check_ways(resume: bool, restart: bool) -> None:
    """Raise `ValueError` where an unfinished run is to go on and to be thrown away."""
    if resume and restart:
        raise ValueError("resume continues an unfinished run and restart throws it away; give one of the two")


def check_output(output: Path, overwrite: bool, inputs: Inputs = ()) -> None:
    """Raise `ValueError` if an output cannot be used: no folder can be made there, or it may not be replaced.

    With `overwrite` an output of this program may be replaced.
    A folder that holds anything else is never replaced.
    """
    check_target(output, inputs)
    if not output.is_dir() or not any(output.iterdir()):
        return
    check_ours(output.resolve(), f"output folder {output}")
    if not overwrite:
        raise ValueError(
            f"output folder {output} is not empty; "
            "choose another with --output or replace it with --overwrite"
        )


def check_target(output: Path, inputs: Inputs = ()) -> None:
    """Raise `ValueError` if there can be no output folder of this name and place, whatever it holds."""
    _check_name(output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file; name a folder")
    above = next(p for p in (output, *output.resolve().parents) if p.exists())
    if not above.is_dir():
        raise ValueError(f"output {output} cannot be made: {above} is a file; choose another --output")
    check_place(output, inputs)


def _check_name(output: Path) -> None:
    """Raise `ValueError` if no output can have this name."""
    try:
        str(output).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"output {str(output)!a} is not UTF-8, which weight files cannot be read under; "
            "choose another --output"
        ) from None
    name = output.resolve().name
    if _DERIVED.fullmatch(name):
        raise ValueError(
            f"output {output}: names such as {name} belong to unfinished runs; choose another --output"
        )
    try:
        os.lstat(output.resolve().with_name(f".{name}.replaced"))
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) == errno.ENAMETOOLONG:
            raise ValueError(f"output name {shown(name)} is too long; choose another --output") from None


def check_ours(folder: Path, called: str, unfinished: bool = False) -> None:
    """Raise `ValueError` if a folder holds anything foreign. `called`: how the message names the folder."""
    if folder.is_symlink() or not folder.is_dir():
        raise ValueError(f"{called} is no folder of llmprune's and would have to be replaced; move it away")
    foreign = foreign_entries(folder, unfinished)
    if foreign and (folder / SWEEP).is_file():
        raise ValueError(f"{called} holds a sweep, which no other output replaces; choose another --output")
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise ValueError(
            f"{called} holds {shown(foreign[0])}{more}, which llmprune has not written, "
            "so it is not replaced; choose another --output, or move that away first"
        )


def foreign_entries(folder: Path, unfinished: bool = False) -> list[str]:
    """The names in a folder that do not belong to one output of this program, sorted.

    A finished output is recognised by its record, which lists its files with their sizes, an unfinished one
    by its journal. Links and special files are foreign, and in an unfinished output, into whose files a run
    would write, also files with a second hard link.
    """
    listed = {} if unfinished else _recorded_files(folder)
    ours = _of_journal(folder) if unfinished or listed is None else lambda entry: _is_recorded(entry, listed)
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    return [e.name for e in entries if not _is_plain(e, alone=unfinished) or not ours(e)]


def _is_plain(entry: os.DirEntry[str], alone: bool) -> bool:
    """Whether an entry is a regular file; with `alone`, one without a second hard link."""
    if not entry.is_file(follow_symlinks=False):
        return False
    return not alone or entry.stat(follow_symlinks=False).st_nlink <= 1


def _is_recorded(entry: os.DirEntry[str], listed: Mapping[str, int]) -> bool:
    """Whether the record lists a file with its present size, or the file is written after the record."""
    if entry.name in listed:
        return entry.stat(follow_symlinks=False).st_size == listed[entry.name]
    return entry.name.removesuffix(TEMPORARY) in WRITTEN_LAST


def _recorded_files(folder: Path) -> Mapping[str, int] | None:
    """The files that a folder's record lists, with their sizes in bytes; None if it has no usable record."""
    path = folder / RECORD
    try:
        if not path.is_file() or path.is_symlink():
            return None
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or "matrices" not in record or "schema" not in record:
        return None
    totals = record.get("totals")
    files = totals.get("files") if isinstance(totals, dict) else None
    if not isinstance(files, dict) or not all(isinstance(size, int) for size in files.values()):
        return None
    return files


def _of_journal(folder: Path) -> Callable[[os.DirEntry[str]], bool]:
    """A function that tells whether an entry of a folder is written by the run of the folder's journal."""
    path = folder / JOURNAL
    if not path.is_file() or path.is_symlink():
        # A run that was killed before its journal was complete has written nothing else.
        return lambda entry: entry.name == JOURNAL + TEMPORARY
    planned = _planned_files(path)

    def ours(entry: os.DirEntry[str]) -> bool:
        name = entry.name.removesuffix(TEMPORARY)
        if is_shard(name) or name in (JOURNAL, MASKS):
            return True
        if planned is None:  # a model in memory: transformers chooses the names of config and tokenizer files
            return name in MADE or is_exact(name) or is_companion(name, code=True)
        return isinstance(planned, list) and name in planned

    return ours


def _planned_files(journal: Path) -> object:
    """The files that a journal's run writes: None if not known in advance, empty for a damaged journal."""
    try:
        with journal.open(encoding="utf-8") as file:
            first = json.loads(file.readline(1 << 24))
    except (OSError, ValueError, RecursionError):
        return []
    identity = first.get("identity") if isinstance(first, dict) else None
    ours = isinstance(identity, dict) and ("model" in identity or "convert" in identity)
    return first.get("files") if ours else []


def remove(folder: Path, unfinished: bool = False) -> list[str]:
    """Remove an output of this program, finished or unfinished.

    Returns the names of foreign files, which stay.

    The record and the journal, by which the folder is recognised, are removed last, so that a removal that
    was interrupted can be repeated.
    """
    if folder.is_symlink():
        raise ValueError(f"{folder} is a link and no folder of llmprune's; move it away")
    foreign = foreign_entries(folder, unfinished)
    names = {entry.name for entry in os.scandir(folder)} - set(foreign)
    for name in sorted(names, key=lambda name: (name in (RECORD, JOURNAL), name)):
        (folder / name).unlink(missing_ok=True)
    if not foreign:
        folder.rmdir()
    return foreign


def strip(folder: Path) -> None:
    """Remove the weights of a finished output and what belongs to them; record and report stay.

    Foreign files stay, too.
    """
    foreign = foreign_entries(folder)
    left = {*PAGES, *foreign} - {CARD}
    names = {entry.name for entry in os.scandir(folder)} - left
    for name in sorted(names, key=lambda name: (name != INDEX, name)):  # without an index it is no checkpoint
        (folder / name).unlink(missing_ok=True)


def input_files(named: Iterable[tuple[str, object]]) -> Inputs:
    """Those of a run's inputs, given by name and value, that are files or folders on this machine."""
    paths = [
        (what, Path(value).expanduser())
        for what, value in named
        if isinstance(value, (str, os.PathLike)) and os.fspath(value)
    ]
    return [(what, path) for what, path in paths if path.exists()]
