"""Writes a checkpoint: one shard per block, in a folder beside the output, moved into place when complete."""

from __future__ import annotations

import json
import os
from collections.abc import Container, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llmprune.checkpoint import replacement
from llmprune.checkpoint.contents import (
    BEST_STEP,
    CONFIG,
    INDEX,
    JOURNAL,
    MADE,
    MASKS,
    RECORD,
    TEMPORARY,
    TRAINING,
    WRITTEN_LAST,
    exact_name,
    shard_name,
)
from llmprune.checkpoint.files import (
    WeightFile,
    read_header,
    save_tensors,
    sha256_of,
    sync_folder,
    write_durably,
)
from llmprune.checkpoint.journal import Identity, Journal, difference, remove
from llmprune.checkpoint.lock import Lock
from llmprune.checkpoint.masks import MaskFile
from llmprune.checkpoint.placement import Placement
from llmprune.checkpoint.reader import WeightSource, read_json
from llmprune.checkpoint.shard import Packer, Shard
from llmprune.checkpoint.snapshot import Snapshot


class CheckpointWriter:
    """Writes a checkpoint into `.NAME.partial` beside the output folder NAME, then moves it into place.

    Until `finish` moves it, an existing output folder stays unchanged. A lock keeps other processes out. An
    unfinished run is continued with `resume` and thrown away with `restart`; without either it is thrown away
    if it has finished no block, and refused otherwise.

    Args:
        output: the output folder.
        overwrite: whether an existing output of this program may be replaced.
        resume: continue an unfinished run.
        restart: throw an unfinished run away.
        inputs: what the run reads, which must not be overwritten.

    Attributes:
        reopened: the output was complete already, so there is nothing to write; `journal` is the one left in
            it.

    Raises:
        ValueError: the output cannot be used, another process is writing it, or there is an unfinished run.
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
        replacement.check_ways(resume, restart)
        self._given, self.overwrite, self._begun = output, overwrite, False
        target = output.resolve()
        complete = resume and (target / INDEX).is_file() and (target / RECORD).is_file()
        replacement.check_output(output, overwrite or complete, inputs)
        self._place = Placement(output, overwrite)
        self.output, self.folder = self._place.output, self._place.folder
        self._lock = Lock(self.output.with_name(f".{self.output.name}.lock"), f"output {self._given}")
        try:
            self._place.check_beside(resume)
            self.journal = self._unfinished(resume, restart)
            self.reopened = complete and not self.journal.blocks
            if not self.reopened:
                # Once more: `check_beside` may have put an old output back, which this run would replace.
                replacement.check_output(output, overwrite, inputs)
        except BaseException:
            self._lock.release()
            raise
        if self.reopened:
            self.journal = Journal(self.output / JOURNAL)
        self._behind = ThreadPoolExecutor(1, "write-behind")
        self._pending: Future[None] | None = None
        self._masks: MaskFile | None = None
        self._packing: Packer | None = None

    def _unfinished(self, resume: bool, restart: bool) -> Journal:
        """The journal of the unfinished run to continue; an empty one if there is none."""
        if restart:  # the old journal is removed by `begin`, when it is known that the new run is possible
            return Journal(self.folder / JOURNAL, anew=True)
        journal = Journal(self.folder / JOURNAL)
        if (journal.blocks or journal.trains) and not resume:
            held = f"{len(journal.blocks)} finished blocks" if journal.blocks else "a training that has begun"
            raise ValueError(
                f"an unfinished run into {self._given} holds {held}; "
                "continue it with --resume or throw it away with --restart"
            )
        return journal if resume else Journal(self.folder / JOURNAL, anew=True)

    def _clear(self) -> None:
        """Throw an unfinished run away."""
        self._place.clear()
        self.journal = Journal(self.folder / JOURNAL, anew=True)

    def begin(
        self,
        identity: Identity,
        shards: int,
        masks: Mapping[str, tuple[int, int]],
        companions: list[str] | None = None,
        exact: bool = False,
        packing: Packer | None = None,
    ) -> None:
        """Start writing, or continue where the run with this identity stopped.

        Args:
            identity: of the run.
            shards: how many weight files the output will have.
            masks: weight name -> (R, C).
            companions: names of the files that will be copied from the source folder; None if not known yet.
            exact: whether float32 results of the blocks will be kept until the run is complete.
            packing: packs the tensors; None for dense ones, with the masks in a file of their own.

        Raises:
            ValueError: the unfinished run is another one, or a file that it finished was changed.
        """
        self.shards, self._packing = shards, packing
        if self.reopened:  # the complete output is of another run, and may be replaced
            self.reopened, self.journal = False, Journal(self.folder / JOURNAL)
        begun = self.journal.blocks or self.journal.trains
        if not begun and self.journal.identity != json.loads(json.dumps(identity)):
            self._clear()
            self._begun = True
            self.folder.mkdir(parents=True, exist_ok=True)
            sync_folder(self.folder.parent)
            weights = [shard_name(number, shards) for number in range(1, shards + 1)]
            weights += [exact_name(number) for number in range(1, shards)] if exact else []
            weights += [TRAINING, BEST_STEP] if "recovery" in identity else []
            self.journal.begin(identity, None if companions is None else [*weights, *MADE, *companions])
        self.check_identity(identity)
        for entry in self.journal.blocks:
            self._check_file(entry["file"], entry["sha256"])
            if "exact" in entry and not self._pruned:
                self._check_file(exact_name(entry["block"]), entry["exact"])
        self._begun = True
        self._masks = MaskFile(self.folder / MASKS, masks) if packing is None else None

    @property
    def _pruned(self) -> bool:
        """Whether every block is finished."""
        return len(self.journal.blocks) == self.shards - 1

    def _check_file(self, file: str, sha256: str) -> None:
        path = self.folder / file
        if not path.is_file() or sha256_of(path) != sha256:
            raise ValueError(
                f"{path} was removed or changed since it was finished; begin anew with --restart"
            )

    def check_identity(self, identity: Identity) -> None:
        """Raise `ValueError` if the unfinished run has another identity."""
        differs = difference(self.journal.identity or {}, identity)
        if differs:
            raise ValueError(
                f"the unfinished run into {self._given} is another one: {differs}; "
                "give its options, or begin anew with --restart"
            )

    @property
    def finished(self) -> list[Path]:
        """The shards of the finished blocks, in order."""
        return [self.folder / entry["file"] for entry in self.journal.blocks]

    @property
    def exact(self) -> list[Path]:
        """The files with float32 results of finished blocks, in order; none once every block is finished."""
        entries = [] if self._pruned else self.journal.blocks
        return [self.folder / exact_name(entry["block"]) for entry in entries if "exact" in entry]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of the record for the finished blocks, in order."""
        self._wait()
        return [row for entry in self.journal.blocks for row in entry["rows"]]

    def block(self, number: int, shard: Shard, seconds: Mapping[str, float]) -> None:
        """Write a finished block in the background: shard and masks durably, then its line in the journal.

        Args:
            number: of the block, from 1.
            shard: the block.
            seconds: the time it took, by stage.
        """
        self._wait()
        self._pending = self._behind.submit(self._write_block, number, shard, dict(seconds))

    def _write_block(self, number: int, shard: Shard, seconds: dict[str, float]) -> None:
        packing = self._packing
        stored = packing.parts(shard.tensors, shard.masks, shard.scales) if packing else shard.tensors
        size, digest = save_tensors(self.folder / shard_name(number, self.shards), stored)
        if self._masks is not None:
            self._masks.write(shard.masks)
        entry = {
            "block": number,
            "file": shard_name(number, self.shards),
            "bytes": size,
            "sha256": digest,
            "rows": shard.rows,
            "seconds": seconds,
        }
        if shard.exact:
            _, entry["exact"] = save_tensors(self.folder / exact_name(number), shard.exact)
        self.journal.add(entry)

    def _wait(self) -> None:
        """Wait for the block that is being written, and raise the error if that failed."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def rest(self, source: WeightSource, blocks: Container[str] = ()) -> None:
        """Write the last shard: every tensor that is in no block, byte for byte as in the source.

        Args:
            source: of the run.
            blocks: tensors of blocks that may be stored under other names than their own.
        """
        self._wait()
        written = {name for entry in self.journal.blocks for name in read_header(self.folder / entry["file"])}
        for entry in self.journal.blocks:
            if "exact" in entry:
                (self.folder / exact_name(entry["block"])).unlink(missing_ok=True)
        outside = {
            name: source.load(name) for name in source.tensors if name not in written and name not in blocks
        }
        save_tensors(self.folder / shard_name(self.shards, self.shards), outside)

    def copy_companions(self, source: Snapshot, code: bool) -> None:
        """Copy config and tokenizer files unchanged from the source folder; Python files only with `code`."""
        for name in source.companions(code):
            write_durably(self.folder / name, [source.read(name)])

    def index(self) -> None:
        """Write what config.json says of packing, then the index: if it is there, every weight is written."""
        files = [shard_name(number, self.shards) for number in range(1, self.shards + 1)]
        headers = {file: read_header(self.folder / file) for file in files}
        where = {name: file for file, entries in headers.items() for name in entries}
        if self._packing is not None:
            self._describe_packing(self._packing, where)
        total = sum(entry.end - entry.start for entries in headers.values() for entry in entries.values())
        listing = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        write_durably(self.folder / INDEX, [json.dumps(listing, indent=2).encode() + b"\n"])

    def _describe_packing(self, packing: Packer, where: Mapping[str, str]) -> None:
        opened = {file: WeightFile(self.folder / file) for file in dict.fromkeys(where.values())}
        config = self.folder / CONFIG
        values = read_json(config)
        values["quantization_config"] = packing.entry(where, lambda name: opened[where[name]].load(name))
        write_durably(config, [json.dumps(values, indent=2).encode() + b"\n"])

    @property
    def indexed(self) -> bool:
        """Whether every weight is written, also by a run that was stopped after it."""
        return self._pruned and (self.folder / INDEX).is_file()

    @property
    def files(self) -> dict[str, int]:
        """The files of the output and their sizes in bytes, without those that may be written again later."""
        entries = sorted(os.scandir(self.folder), key=lambda entry: entry.name)
        lasting = (e for e in entries if e.name not in WRITTEN_LAST and not e.name.endswith(TEMPORARY))
        return {entry.name: entry.stat().st_size for entry in lasting}

    def finish(self) -> None:
        """Move the finished folder into place; an old output is removed only afterwards.

        Raises:
            RuntimeError: the folder cannot be moved, or something that may not be replaced was put in its
                place.
        """
        self._place.move(self.journal)

    @property
    def moved(self) -> bool:
        """Whether the finished folder is in its place, by what is on the disk."""
        return (self.reopened and self.journal.path.exists()) or self._place.moved

    def complete(self) -> None:
        """End the run for good: remove its journal, and an old output that is still waiting to be removed."""
        self._place.remove_old()
        if self.journal.path.parent == self.output and self.journal.path.exists():
            remove(self.journal.path)

    def close(self) -> int:
        """Wait for what is being written and release the lock.

        An unfinished run without a finished block is removed.

        Returns: how many blocks the run has finished, if it is unfinished; else 0.
        """
        self._behind.shutdown()
        if self._masks is not None:
            self._masks.close()
        if self._begun and self.folder.exists() and not self.journal.entries:
            replacement.remove(self.folder, unfinished=True)
        self._lock.release()
        return len(self.journal.blocks) if self._begun and self.folder.exists() else 0
