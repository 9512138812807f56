"""The folder in which an output is made, beside its place, and the move into that place when it is whole."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from llmprune.checkpoint import replacement
from llmprune.checkpoint.contents import INDEX, JOURNAL
from llmprune.checkpoint.files import sync_folder
from llmprune.checkpoint.journal import Journal
from llmprune.common.messages import size_text


class Placement:
    """The folders of one output: `.NAME.partial` beside NAME, in which it is made, and an old one meanwhile.

    Args:
        output: the output folder, as it was given.
        overwrite: whether an existing output of this program may be replaced.

    Attributes:
        output: the output folder, with links followed.
        folder: in which the output is made.
    """

    def __init__(self, output: Path, overwrite: bool) -> None:
        self._given, self._overwrite = output, overwrite
        self.output = output.resolve()
        self.folder = self.output.with_name(f".{self.output.name}.partial")
        # Where an old output is kept until the new one is in place; whether one waits there to be removed.
        self._replaced = self.output.with_name(f".{self.output.name}.replaced")
        self._left_behind = self._moving = False

    def check_beside(self, resume: bool) -> None:
        """Check what an earlier run left beside the output.

        If it was killed after it had moved an old output away, the old output is put back.
        """
        if os.path.lexists(self.folder):
            replacement.check_ours(self.folder, str(self.folder), unfinished=True)
        if not os.path.lexists(self._replaced):
            return
        replacement.check_ours(self._replaced, str(self._replaced))
        journals = (self.folder / JOURNAL, self.output / JOURNAL)
        if any(self._replaced.iterdir()) and not any(_says_replacing(path) for path in journals):
            raise ValueError(
                f"{self._replaced} is of no run into {self._given}; move it away, or choose another --output"
            )
        self._left_behind = True
        if not resume and not self.output.exists():
            os.replace(self._replaced, self.output)
            self._left_behind = False

    def clear(self) -> None:
        """Throw an unfinished run away. Raises `ValueError` if its folder holds a foreign file."""
        if self.folder.exists():
            _remove(self.folder, unfinished=True)

    def move(self, journal: Journal) -> None:
        """Move the finished folder, and its journal with it, into place; an old output is removed afterwards.

        Raises:
            RuntimeError: the folder cannot be moved, or something that may not be replaced was put in its
                place.
        """
        try:
            self._make_room(journal)
        except (OSError, ValueError) as error:  # for example, a mount point cannot be renamed
            raise self._not_moved(error) from error
        self._moving = True
        try:
            os.replace(self.folder, self.output)
        except OSError as error:
            self._moving = False
            if self._left_behind and not self.output.exists():
                os.replace(self._replaced, self.output)
                self._left_behind = False
            raise self._not_moved(error) from error
        sync_folder(self.output.parent)
        journal.path = self.output / JOURNAL  # it stays until the run is complete
        self.remove_old()

    def _make_room(self, journal: Journal) -> None:
        """Move an old output away, if it may be replaced."""
        if not self.output.exists():
            return
        if any(self.output.iterdir()):  # hours may have passed since it was checked
            replacement.check_output(self.output, self._overwrite)
        self.remove_old()
        if os.path.lexists(self._replaced):
            raise ValueError(f"{self._replaced} was put there meanwhile")
        journal.add({"replacing": True})  # a later run learns from it that the folder was moved by a run
        os.replace(self.output, self._replaced)
        self._left_behind = True

    def remove_old(self) -> None:
        """Remove the old output, if one was moved away."""
        if self._left_behind and os.path.lexists(self._replaced):
            _remove(self._replaced)
        self._left_behind = False

    @property
    def moved(self) -> bool:
        """Whether the finished folder is in its place, by what is on the disk."""
        return self._moving and not self.folder.exists() and (self.output / INDEX).is_file()

    def _not_moved(self, error: Exception) -> RuntimeError:
        """The error for a finished folder that cannot be moved into place."""
        reason = error.strerror if isinstance(error, OSError) else error
        return RuntimeError(
            f"the finished checkpoint cannot be moved to {self.output} ({reason}); "
            f"it lies whole in {self.folder}"
        )


def _says_replacing(path: Path) -> bool:
    """Whether a journal says that its run is moving an old output away."""
    try:
        return bool(Journal(path).find("replacing"))
    except ValueError:
        return False


def _remove(folder: Path, unfinished: bool = False) -> None:
    """Remove an output of this program. Raises `ValueError` if it holds a foreign file."""
    foreign = replacement.remove(folder, unfinished)
    if foreign:  # put there since the folder was checked
        raise ValueError(
            f"{folder} holds {foreign[0]!r}, which llmprune has not written, so it stays; move it away"
        )


def check_space(output: Path, needed: int) -> None:
    """Raise `ValueError` if the disk of the output folder has fewer than `needed` bytes free."""
    existing = next(p for p in (output, *output.resolve().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"the output needs {size_text(needed)} and {existing} has {size_text(free)} free; "
            "make room or choose another --output"
        )
