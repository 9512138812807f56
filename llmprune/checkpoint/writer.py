"""Writing a checkpoint: one durable shard per block in a folder beside the target, which is moved into place only when whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from llmprune.checkpoint import replacement
from llmprune.checkpoint.contents import INDEX, JOURNAL, MADE, MASKS, RECORD, WRITTEN_LAST, shard_name
from llmprune.checkpoint.files import read_header, save_tensors, sha256_of, sync_folder, write_durably
from llmprune.checkpoint.journal import Identity, Journal, difference, remove
from llmprune.checkpoint.lock import Lock
from llmprune.checkpoint.masks import MaskFile
from llmprune.checkpoint.reader import WeightSource
from llmprune.checkpoint.snapshot import Snapshot
from llmprune.common.messages import size_text


class CheckpointWriter:
    """Writes into `.NAME.partial` beside the output folder, under a lock; `finish` moves the whole folder into place.

    An output folder that exists stays as it is until then. What a run that died left behind is continued with `resume`, thrown away
    with `restart`, and otherwise refused once it holds a finished block.

    Attributes:
        reopened: the output is whole already, so there is nothing to write; `journal` is what its run left to do.

    Raises:
        ValueError: an output that cannot be used, one that another process is writing, an unfinished run in it.
    """

    def __init__(
        self,
        output: Path,
        *,
        overwrite: bool = False,
        resume: bool = False,
        restart: bool = False,
        inputs: replacement.Inputs = (),
    ) -> None:
        if resume and restart:
            raise ValueError(
                "resume continues an unfinished run and restart throws it away; give one of the two"
            )
        self._given, self.overwrite = output, overwrite
        self._left_behind = self._begun = self._moving = False
        self.output = output.resolve()  # through links
        whole = resume and (self.output / INDEX).is_file() and (self.output / RECORD).is_file()
        replacement.check_output(output, overwrite or whole, inputs)
        self.folder = self.output.with_name(f".{self.output.name}.partial")
        self._lock = Lock(self.output.with_name(f".{self.output.name}.lock"), f"output {self._given}")
        try:
            self._check_beside(resume)
            self.journal = self._unfinished(resume, restart)
            self.reopened = whole and not self.journal.blocks
            if not self.reopened:  # the run ends with replacing what stands there, perhaps an old output that is back in its place
                replacement.check_output(output, overwrite, inputs)
        except BaseException:
            self._lock.release()
            raise
        if self.reopened:
            self.journal = Journal(self.output / JOURNAL)
        self._behind = ThreadPoolExecutor(1, "write-behind")
        self._pending: Future[None] | None = None
        self._masks: MaskFile | None = None

    def _unfinished(self, resume: bool, restart: bool) -> Journal:
        """The journal of what an earlier run left here, to go on with; an empty one where nothing is gone on with."""
        if restart:  # thrown away when the new run begins, not before it is known to be possible
            return Journal(self.folder / JOURNAL, anew=True)
        journal = Journal(self.folder / JOURNAL)
        if journal.blocks and not resume:
            raise ValueError(
                f"an unfinished run into {self._given} holds {len(journal.blocks)} finished blocks; "
                "continue it with --resume or throw it away with --restart"
            )
        return journal if resume else Journal(self.folder / JOURNAL, anew=True)

    def _check_beside(self, resume: bool) -> None:
        """Look at what an earlier run left beside the output, and put an old output back that a run died over moving away."""
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

    @property
    def _replaced(self) -> Path:
        """Where what stood in the output waits until the new one is in place."""
        return self.output.with_name(f".{self.output.name}.replaced")

    def _clear(self) -> None:
        if self.folder.exists():
            _remove(self.folder, unfinished=True)
        self.journal = Journal(self.folder / JOURNAL, anew=True)

    def begin(
        self,
        identity: Identity,
        shards: int,
        masks: Mapping[str, tuple[int, int]],
        companions: list[str] | None = None,
    ) -> None:
        """Start writing, or go on where the run with this identity stopped.

        Args:
            masks: weight name -> (R, C). companions: the files that will go along with the weights, None where they are not known yet.

        Raises:
            ValueError: the unfinished run is another one, or what it finished was changed since.
        """
        self.shards = shards
        if self.reopened:  # what stands there is another run, and may be replaced
            self.reopened, self.journal = False, Journal(self.folder / JOURNAL)
        if not self.journal.blocks and self.journal.identity != json.loads(json.dumps(identity)):
            self._clear()
            self._begun = True
            self.folder.mkdir(parents=True, exist_ok=True)
            sync_folder(self.folder.parent)
            weights = [shard_name(number, shards) for number in range(1, shards + 1)]
            self.journal.begin(identity, None if companions is None else [*weights, *MADE, *companions])
        self.check_identity(identity)
        for entry in self.journal.blocks:
            path = self.folder / entry["file"]
            if not path.is_file() or sha256_of(path) != entry["sha256"]:
                raise ValueError(
                    f"{path} was removed or changed since it was finished; begin anew with --restart"
                )
        self._begun = True
        self._masks = MaskFile(self.folder / MASKS, masks)

    def check_identity(self, identity: Identity) -> None:
        """Raise `ValueError` where the unfinished run is another one."""
        differs = difference(self.journal.identity or {}, identity)
        if differs:
            raise ValueError(
                f"the unfinished run into {self._given} is another one: {differs}; give its options, or begin anew with --restart"
            )

    @property
    def finished(self) -> list[Path]:
        """The shards of the blocks that are done and durable, in order."""
        return [self.folder / entry["file"] for entry in self.journal.blocks]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The record's rows of the finished blocks, in order."""
        self._wait()
        return [row for entry in self.journal.blocks for row in entry["rows"]]

    def block(
        self,
        number: int,
        tensors: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        rows: list[dict[str, Any]],
        seconds: Mapping[str, float],
    ) -> None:
        """Finish block `number` (from 1) in the background: shard and packed masks durable, then its line in the journal."""
        self._wait()
        self._pending = self._behind.submit(self._write_block, number, tensors, masks, rows, dict(seconds))

    def _write_block(
        self,
        number: int,
        tensors: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        rows: list[dict[str, Any]],
        seconds: dict[str, float],
    ) -> None:
        assert self._masks is not None
        size, digest = save_tensors(self.folder / shard_name(number, self.shards), tensors)
        self._masks.write(masks)
        entry = {
            "block": number,
            "file": shard_name(number, self.shards),
            "bytes": size,
            "sha256": digest,
            "rows": rows,
            "seconds": seconds,
        }
        self.journal.add(entry)

    def _wait(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def rest(self, source: WeightSource) -> None:
        """The last shard: every tensor that no block wrote, byte for byte."""
        self._wait()
        written = {name for entry in self.journal.blocks for name in read_header(self.folder / entry["file"])}
        outside = [name for name in source.tensors if name not in written]
        save_tensors(
            self.folder / shard_name(self.shards, self.shards), {name: source.load(name) for name in outside}
        )

    def copy_companions(self, source: Snapshot, code: bool) -> None:
        """Config and tokenizer files as they are in the source folder; Python files only when its code was asked for."""
        for name in source.companions(code):
            write_durably(self.folder / name, [source.read(name)])

    def index(self) -> None:
        """The index: its presence means every weight is there."""
        shards = {
            shard_name(n, self.shards): read_header(self.folder / shard_name(n, self.shards))
            for n in range(1, self.shards + 1)
        }
        where = {name: file for file, entries in shards.items() for name in entries}
        total = sum(e.end - e.start for entries in shards.values() for e in entries.values())
        text = json.dumps(
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}, indent=2
        )
        write_durably(self.folder / INDEX, [text.encode() + b"\n"])

    @property
    def files(self) -> dict[str, int]:
        """The files of the output with their bytes, but for those that are written last and may be written again."""
        entries = sorted(os.scandir(self.folder), key=lambda entry: entry.name)
        return {
            e.name: e.stat().st_size
            for e in entries
            if e.name not in WRITTEN_LAST and not e.name.endswith(".tmp")
        }

    def finish(self) -> None:
        """Move the finished folder into place; what stood there is removed only afterwards.

        Raises:
            RuntimeError: it cannot be moved, or something was put there during the run that is not replaced.
        """
        old = self._replaced
        try:
            self._make_room(old)
        except (OSError, ValueError) as error:  # a mount point, for one, cannot be renamed
            raise self._not_moved(error) from error
        self._moving = True
        try:
            os.replace(self.folder, self.output)
        except OSError as error:
            self._moving = False
            if self._left_behind and not self.output.exists():
                os.replace(old, self.output)
                self._left_behind = False
            raise self._not_moved(error) from error
        sync_folder(self.output.parent)
        self.journal.path = self.output / JOURNAL  # stays until the run has nothing left to do
        self._remove_replaced()

    def _make_room(self, old: Path) -> None:
        """Move what stands in the output aside, where it may be replaced."""
        if not self.output.exists():
            return
        if any(self.output.iterdir()):  # hours may have passed since it was looked at
            replacement.check_output(self.output, self.overwrite)
        self._remove_replaced()
        if os.path.lexists(old):
            raise ValueError(f"{old} was put there meanwhile")
        self.journal.add({"replacing": True})  # tells a later run whose the folder is
        os.replace(self.output, old)
        self._left_behind = True

    def _remove_replaced(self) -> None:
        if self._left_behind and os.path.lexists(self._replaced):
            _remove(self._replaced)
        self._left_behind = False

    @property
    def moved(self) -> bool:
        """Whether the finished folder is in its place, as far as the disk tells."""
        return (self.reopened and self.journal.path.exists()) or (
            self._moving and not self.folder.exists() and (self.output / INDEX).is_file()
        )

    def complete(self) -> None:
        """Nothing is left to do: the journal goes, and what a run that was killed while moving had replaced."""
        self._remove_replaced()
        if self.journal.path.parent == self.output and self.journal.path.exists():
            remove(self.journal.path)

    def _not_moved(self, error: Exception) -> RuntimeError:
        reason = error.strerror if isinstance(error, OSError) else error
        return RuntimeError(
            f"the finished checkpoint cannot be moved to {self.output} ({reason}); it lies whole in {self.folder}"
        )

    def close(self) -> int:
        """Wait for what is being written and release the lock; returns how many blocks an unfinished run has finished.

        One that has finished nothing is removed.
        """
        self._behind.shutdown()
        if self._masks is not None:
            self._masks.close()
        if self._begun and self.folder.exists() and not self.journal.entries:
            replacement.remove(self.folder, unfinished=True)
        self._lock.release()
        return len(self.journal.blocks) if self._begun and self.folder.exists() else 0


def _says_replacing(path: Path) -> bool:
    """Whether a journal says that its run is moving an old output away."""
    try:
        return bool(Journal(path).find("replacing"))
    except ValueError:
        return False


def _remove(folder: Path, unfinished: bool = False) -> None:
    foreign = replacement.remove(folder, unfinished)
    if foreign:  # put there a moment ago
        raise ValueError(
            f"{folder} holds {foreign[0]!r}, which llmprune has not written, so it stays; move it away"
        )


def check_space(output: Path, needed: int) -> None:
    """Raise `ValueError` when the disk of the output folder has less than `needed` bytes free."""
    existing = next(p for p in (output, *output.resolve().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"the output needs {size_text(needed)} and {existing} has {size_text(free)} free; make room or choose another --output"
        )
