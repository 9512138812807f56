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

from llmprune.checkpoint.files import read_header, save_tensors, sha256_of, sync_folder, write_durably
from llmprune.checkpoint.journal import Identity, Journal, difference, remove
from llmprune.checkpoint.lock import Lock
from llmprune.checkpoint.masks import MaskFile
from llmprune.checkpoint.reader import INDEX, WeightSource

# What a loader or a reader of the licence needs; anything else in the source folder is not ours to publish.
COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "chat_template*", "preprocessor_config.json", "processor_config.json", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*",
)  # fmt: skip
RECORD = "llmprune.json"
_JOURNAL = "journal.jsonl"


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
        self, output: Path, *, overwrite: bool = False, resume: bool = False, restart: bool = False, source: Path | None = None
    ) -> None:
        if resume and restart:
            raise ValueError("resume continues an unfinished run and restart throws it away; give one of the two")
        self._given, self.overwrite = output, overwrite
        self.output = output.resolve()  # through links, and "." gets a name
        self.folder = self.output.with_name(f".{self.output.name}.partial")
        whole = resume and (self.output / INDEX).is_file() and (self.output / RECORD).is_file()
        check_output(output, overwrite or whole, source)
        self._lock = Lock(self.output.with_name(f".{self.output.name}.lock"), f"output {self._given}")
        try:
            self.journal = Journal(self.folder / _JOURNAL)
            if self.journal.blocks and not resume and not restart:
                raise ValueError(
                    f"an unfinished run into {self._given} holds {len(self.journal.blocks)} finished blocks; "
                    "continue it with --resume or throw it away with --restart"
                )
            if not resume:
                self._clear()
        except BaseException:
            self._lock.release()
            raise
        self.reopened = whole and not self.journal.blocks
        if self.reopened:
            self.journal = Journal(self.output / _JOURNAL)
        self._behind = ThreadPoolExecutor(1, "write-behind")
        self._pending: Future[None] | None = None
        self._masks: MaskFile | None = None

    def _clear(self) -> None:
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.journal = Journal(self.folder / _JOURNAL)

    def begin(self, identity: Identity, shards: int, masks: Mapping[str, tuple[int, int]]) -> None:
        """Start writing, or go on where the run with this identity stopped. `masks`: weight name -> (R, C).

        Raises:
            ValueError: the unfinished run is another one, or what it finished was changed since.
        """
        self.shards = shards
        if self.reopened:  # what stands there is another run, and may be replaced
            self.reopened, self.journal = False, Journal(self.folder / _JOURNAL)
        if not self.journal.blocks and self.journal.identity != json.loads(json.dumps(identity)):
            self._clear()
            self.folder.mkdir(parents=True, exist_ok=True)
            sync_folder(self.folder.parent)
            self.journal.begin(identity)
        self.check_identity(identity)
        for entry in self.journal.blocks:
            path = self.folder / entry["file"]
            if not path.is_file() or sha256_of(path) != entry["sha256"]:
                raise ValueError(f"{path} was removed or changed since it was finished; begin anew with --restart")
        self._masks = MaskFile(self.folder / "masks.safetensors", masks)

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
        self, number: int, tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor], rows: list[dict[str, Any]],
        seconds: Mapping[str, float],
    ) -> None:  # fmt: skip
        """Finish block `number` (from 1) in the background: shard and packed masks durable, then its line in the journal."""
        self._wait()
        self._pending = self._behind.submit(self._write_block, number, tensors, masks, rows, dict(seconds))

    def _write_block(
        self, number: int, tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor], rows: list[dict[str, Any]], seconds: dict[str, float]
    ) -> None:  # fmt: skip
        assert self._masks is not None
        size, digest = save_tensors(self.folder / self._name(number), tensors)
        self._masks.write(masks)
        entry = {"block": number, "file": self._name(number), "bytes": size, "sha256": digest, "rows": rows, "seconds": seconds}
        self.journal.add(entry)

    def _wait(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _name(self, number: int) -> str:
        return f"model-{number:05d}-of-{self.shards:05d}.safetensors"

    def rest(self, source: WeightSource) -> None:
        """The last shard: every tensor that no block wrote, byte for byte."""
        self._wait()
        written = {name for entry in self.journal.blocks for name in read_header(self.folder / entry["file"])}
        outside = [name for name in source.tensors if name not in written]
        save_tensors(self.folder / self._name(self.shards), {name: source.load(name) for name in outside})

    def copy_companions(self, source: Path, code: bool) -> None:
        """Config and tokenizer files as they are in the source folder; Python files only when its code was asked for."""
        for path in sorted(source.iterdir()):
            wanted = any(path.match(pattern) for pattern in COMPANIONS) or (code and path.suffix == ".py")
            if path.is_file() and wanted:
                write_durably(self.folder / path.name, [path.read_bytes()])

    def index(self) -> None:
        """The index: its presence means every weight is there."""
        shards = {self._name(n): read_header(self.folder / self._name(n)) for n in range(1, self.shards + 1)}
        where = {name: file for file, entries in shards.items() for name in entries}
        total = sum(e.end - e.start for entries in shards.values() for e in entries.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}, indent=2)
        write_durably(self.folder / INDEX, [text.encode() + b"\n"])

    def finish(self) -> None:
        """Move the finished folder into place; what stood there is removed only afterwards."""
        old = self.output.with_name(f".{self.output.name}.replaced")
        if old.exists():
            shutil.rmtree(old)
        try:
            if self.output.exists():
                os.replace(self.output, old)
        except OSError as error:  # a mount point, for one, cannot be renamed
            raise self._not_moved(error) from error
        try:
            os.replace(self.folder, self.output)
        except OSError as error:
            if old.exists():
                os.replace(old, self.output)
            raise self._not_moved(error) from error
        sync_folder(self.output.parent)
        self.journal.path = self.output / _JOURNAL  # stays until the run has nothing left to do
        if old.exists():
            shutil.rmtree(old)

    def complete(self) -> None:
        """Nothing is left to do: the journal goes, and what a run that was killed while moving had replaced."""
        old = self.output.with_name(f".{self.output.name}.replaced")
        if old.exists() and self.output.exists():
            shutil.rmtree(old)
        if self.journal.path.parent == self.output and self.journal.path.exists():
            remove(self.journal.path)

    def _not_moved(self, error: OSError) -> RuntimeError:
        return RuntimeError(f"the finished checkpoint cannot be moved to {self.output} ({error.strerror}); it lies whole in {self.folder}")

    def close(self) -> int:
        """Wait for what is being written and release the lock; returns how many blocks an unfinished run has finished.

        One that has finished nothing is removed.
        """
        self._behind.shutdown()
        if self._masks is not None:
            self._masks.close()
        if self.folder.exists() and not self.journal.entries:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()
        return len(self.journal.blocks) if self.folder.exists() else 0


def check_output(output: Path, overwrite: bool, source: Path | None = None) -> None:
    """Raise `ValueError` where the output cannot be used.

    That is a file, a folder that is not empty and may not be replaced, or one whose replacement would take the model, the working
    directory or the user's home with it.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file; name a folder")
    above = next(p for p in (output, *output.resolve().parents) if p.exists())
    if not above.is_dir():
        raise ValueError(f"output {output} cannot be made: {above} is a file; choose another --output")
    if not output.is_dir() or not any(output.iterdir()):
        return
    for kept, what in ((source, "the source model"), (Path.cwd(), "the working directory"), (Path.home(), "the home folder")):
        if kept is not None and output.resolve() in (kept.resolve(), *kept.resolve().parents):
            raise ValueError(f"output folder {output} holds {what}, which is never replaced; choose another with --output")
    if not overwrite:
        raise ValueError(f"output folder {output} is not empty; choose another with --output or replace it with --overwrite")


def check_space(output: Path, needed: int) -> None:
    """Raise `ValueError` when the disk of the output folder has less than `needed` bytes free."""
    existing = next(p for p in (output, *output.resolve().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"the output needs {needed / 1e9:.2f} GB and {existing} has {free / 1e9:.2f} GB free; make room or choose another --output"
        )
