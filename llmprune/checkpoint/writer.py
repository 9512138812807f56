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

# What a loader or a reader of the licence needs; anything else in the source folder is not ours to publish.
COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "chat_template*", "preprocessor_config.json", "processor_config.json", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*",
)  # fmt: skip


class CheckpointWriter:
    """Writes into `.NAME.partial` beside the output folder; `finish` puts the index last and moves the whole folder into place.

    An output folder that exists stays as it is until then.
    """

    def __init__(self, output: Path, shards: int, overwrite: bool) -> None:
        check_output(output, overwrite)
        output = output.resolve()  # through links, and "." gets a name
        self.output, self.shards, self._whole = output, shards, False
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
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # safetensors writes for the owner alone
        os.replace(temporary, self.folder / name)
        self._weight_map |= dict.fromkeys(tensors, name)
        self._bytes += sum(t.nbytes for t in tensors.values())

    def copy_companions(self, source: Path, code: bool) -> None:
        """Config and tokenizer files as they are in the source folder; Python files only when its code was asked for."""
        for path in sorted(source.iterdir()):
            wanted = any(path.match(pattern) for pattern in COMPANIONS) or (code and path.suffix == ".py")
            if path.is_file() and wanted:
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
        if old.exists():
            shutil.rmtree(old)

    def _not_moved(self, error: OSError) -> RuntimeError:
        self._whole = True
        return RuntimeError(f"the finished checkpoint cannot be moved to {self.output} ({error.strerror}); it lies whole in {self.folder}")

    def discard(self) -> None:
        """Remove what an unfinished run wrote; a whole checkpoint that only could not be moved stays."""
        if not self._whole:
            shutil.rmtree(self.folder, ignore_errors=True)


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
