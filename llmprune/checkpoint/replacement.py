"""Which folder may be written or replaced, and how one is removed: file by file, by name, and never what is not ours.

Every folder that this program replaces or throws away goes through `check_place`, `foreign_entries` and `remove`.
"""

from __future__ import annotations

import json
import os
import pwd
from collections.abc import Iterable, Mapping
from pathlib import Path

from llmprune.checkpoint.contents import JOURNAL, RECORD, is_companion, is_made, is_weights
from llmprune.data import shown

_TEMPORARY = ".tmp"  # a file that was being written when its run died
# Folders of the system: never an output. Below the sealed ones nothing is, but for the open ones.
_SEALED = ("bin", "boot", "dev", "etc", "lib", "lib32", "lib64", "libx32", "proc", "sbin", "sys", "usr", "System", "Library")
_MORE = ("home", "media", "mnt", "opt", "private", "root", "run", "snap", "srv", "tmp", "var", "Applications", "Users", "Volumes")
_OPEN = ("dev/shm", "usr/local", "usr/src")


def check_place(output: Path, inputs: Mapping[str, Path]) -> None:
    """Raise `ValueError` where nothing may ever be written as an output, whatever stands there.

    Args:
        output: as it was given; links are followed.
        inputs: what the run reads, by its name in words. A model may be neither above nor below the output, another input not below it.
    """
    target = output.resolve()

    def refused(what: str) -> ValueError:
        return ValueError(f"output folder {output} {what}, which is never replaced; choose another with --output")

    if target.parent == target:
        raise refused("is the root of the file system")
    for what, path in inputs.items():
        for place in {path.resolve(), Path(os.path.abspath(path))}:
            if target == place or target in place.parents:
                raise refused(f"holds {what}")
            if what == "the model" and place in target.parents:
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
    try:
        return Path.cwd().resolve()
    except OSError:  # removed under us
        return None


def _homes() -> set[Path]:
    """The home folders of this machine's users; system accounts that live in a system folder are covered by that."""
    named = [entry.pw_dir for entry in pwd.getpwall()] + [os.environ.get("HOME", "")]
    found = {Path(name).resolve() for name in named if name.startswith("/")}
    return {home for home in found if home.parent != home and not _is_of_system(home)}


def _is_of_system(target: Path) -> bool:
    root = Path(target.anchor)
    if target in {root / name for name in (*_SEALED, *_MORE, *_OPEN)}:
        return True
    if any(root / name in target.parents for name in _OPEN):
        return False
    return any(root / name in target.parents for name in _SEALED)


def check_output(output: Path, overwrite: bool, inputs: Mapping[str, Path]) -> None:
    """Raise `ValueError` where an output cannot be used: no folder can be made there, or it holds what may not be replaced.

    With `overwrite` an output of this program may be replaced; a folder that holds anything else may not, whatever the flags.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file; name a folder")
    above = next(p for p in (output, *output.resolve().parents) if p.exists())
    if not above.is_dir():
        raise ValueError(f"output {output} cannot be made: {above} is a file; choose another --output")
    check_place(output, inputs)
    if not output.is_dir() or not any(output.iterdir()):
        return
    check_ours(output.resolve(), f"output folder {output}")
    if not overwrite:
        raise ValueError(f"output folder {output} is not empty; choose another with --output or replace it with --overwrite")


def check_ours(folder: Path, called: str) -> None:
    """Raise `ValueError` naming what a folder holds that no run of this program has put there."""
    if folder.is_symlink() or not folder.is_dir():
        raise ValueError(f"{called} is no folder of llmprune's and would have to be replaced; move it away")
    foreign = foreign_entries(folder)
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise ValueError(
            f"{called} holds {shown(foreign[0])}{more}, which llmprune has not written, so it is not replaced; "
            "choose another --output, or move that away first"
        )


def foreign_entries(folder: Path) -> list[str]:
    """Names in a folder that are not those of one output of this program, whole or unfinished; sorted.

    A folder is an output by its record or its journal. Of a record that lists its files, others are foreign.
    """
    names = sorted(entry.name for entry in os.scandir(folder))
    folders = {entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)}
    listed = _listed_files(folder)
    if listed is None and not (folder / JOURNAL).is_file():
        return [name for name in names if name != JOURNAL + _TEMPORARY or name in folders]
    return [name for name in names if name in folders or not _is_written(name.removesuffix(_TEMPORARY), listed)]


def _is_written(name: str, listed: frozenset[str] | None) -> bool:
    """Whether a run writes a file of this name; `listed`: the files its record names, None where it names none."""
    if listed and name not in listed:
        return is_made(name)
    # Older records list nothing; what an unfinished run was given leave to copy is not known yet.
    return is_made(name) or is_weights(name) or is_companion(name, code=listed is None or bool(listed))


def _listed_files(folder: Path) -> frozenset[str] | None:
    """The files that a folder's record lists, empty where an older record lists none; None where there is no record."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("totals"), dict) or "matrices" not in record:
        return None
    listed = record["totals"].get("files", [])
    return frozenset(n for n in listed if isinstance(n, str)) if isinstance(listed, list) else None


def remove(folder: Path) -> list[str]:
    """Remove an output of this program, whole or unfinished; returns the names of what is not ours, which stays.

    What tells that the folder is ours goes last: a removal that is killed can be done again.
    """
    foreign = foreign_entries(folder)
    names = {entry.name for entry in os.scandir(folder)} - set(foreign)
    for name in sorted(names, key=lambda name: (name in (RECORD, JOURNAL), name)):
        (folder / name).unlink(missing_ok=True)
    if not foreign:
        folder.rmdir()
    return foreign


def input_files(named: Iterable[tuple[str, object]]) -> dict[str, Path]:
    """The inputs of a run that are files or folders on this machine, by their name in words."""
    found = {}
    for number, (what, value) in enumerate(named):
        if isinstance(value, (str, os.PathLike)) and os.fspath(value) and Path(value).expanduser().exists():
            found[what if what not in found else f"{what} ({number})"] = Path(value).expanduser()
    return found
