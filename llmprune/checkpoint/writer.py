"""Writing a checkpoint: one shard per block beside the target, moved into place only when whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from llmprune.checkpoint.reader import INDEX

_COPIED = (".json", ".model", ".txt", ".jinja", ".tiktoken")
_NOT_COPIED = ("llmprune.json", INDEX)


class CheckpointWriter:
    """Writes into `.NAME.partial` beside the output folder; `finish` puts the index last and moves the whole folder into place.

    An output folder that exists stays as it is until then.
    """

    def __init__(self, output: Path, shards: int, overwrite: bool) -> None:
        self.output, self.shards, self._overwrite = output, shards, overwrite
        check_output(output, overwrite)
        self.folder = output.with_name(f".{output.name}.partial")
        if self.folder.exists():
            shutil.rmtree(self.folder)  # left by a run that died: never complete, never loadable
        self.folder.mkdir(parents=True)
        self._weight_map: dict[str, str] = {}
        self._bytes = 0

    def shard(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write shard `number` (from 1): temporary name, then rename."""
        name = f"model-{number:05d}-of-{self.shards:05d}.safetensors"
        temporary = self.folder / f"{name}.tmp"
        save_file({n: t.contiguous() for n, t in tensors.items()}, temporary, metadata={"format": "pt"})
        os.replace(temporary, self.folder / name)
        self._weight_map |= dict.fromkeys(tensors, name)
        self._bytes += sum(t.nbytes for t in tensors.values())

    def copy_companions(self, source: Path, code: bool) -> None:
        """Config and tokenizer files as they are in the source folder; Python files only when its code was asked for."""
        for path in sorted(source.iterdir()):
            wanted = path.suffix in _COPIED or (code and path.suffix == ".py")
            if path.is_file() and wanted and path.name not in _NOT_COPIED:
                shutil.copyfile(path, self.folder / path.name)

    def index(self) -> None:
        """The index: its presence means every weight is there."""
        index = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(self._weight_map.items()))}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def finish(self) -> None:
        """Move the finished folder into place; what stood there is removed only afterwards."""
        old = self.output.with_name(f".{self.output.name}.replaced")
        if old.exists():
            shutil.rmtree(old)
        if self.output.exists():
            os.replace(self.output, old)
        os.replace(self.folder, self.output)
        if old.exists():
            shutil.rmtree(old)

    def discard(self) -> None:
        """Remove what an unfinished run wrote."""
        shutil.rmtree(self.folder, ignore_errors=True)


def check_output(output: Path, overwrite: bool) -> None:
    """Raise `ValueError` where the output cannot be used: a file, or a folder that is not empty and may not be replaced."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file; name a folder")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ValueError(f"output folder {output} is not empty; choose another with --output or replace it with --overwrite")


def check_space(output: Path, needed: int) -> None:
    """Raise `ValueError` when the disk of the output folder has less than `needed` bytes free."""
    existing = next(p for p in (output, *output.resolve().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"the output needs {needed / 1e9:.2f} GB and {existing} has {free / 1e9:.2f} GB free; make room or choose another --output"
        )
