"""Opens a model, given by name, folder, hub id or as a model in memory, without loading its weights."""

from __future__ import annotations

import copy
import functools
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune.checkpoint.bitmask import Bitmasked
from llmprune.checkpoint.contents import CONFIG, RECORD
from llmprune.checkpoint.dequantised import Dequantised
from llmprune.checkpoint.packed import Packed
from llmprune.checkpoint.packed_entry import packing_entry
from llmprune.checkpoint.reader import Checkpoint, MemoryCheckpoint, WeightSource, read_json, read_record
from llmprune.checkpoint.snapshot import Snapshot
from llmprune.hub.download import Located, locate
from llmprune.machine import device as devices
from llmprune.machine.state import libraries
from llmprune.model.config import check_folder, check_whole, read_config, token_limit
from llmprune.model.quantised import (
    check_stored,
    dequantising,
    in_bitmasks,
    without_quantisation,
)
from llmprune.model.skeleton import Skeleton
from llmprune.model.tokenizer import read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Source = Checkpoint | Dequantised | Packed | Bitmasked  # where the weights of a folder are read from


@dataclass(frozen=True)
class Model:
    """An opened model.

    Attributes:
        located: its folder; None for a model in memory.
        files: its small files as they were when it was opened; None for a model in memory.
        label: its name in the record.
        source: where its weights are read from.
        skeleton: the model without weights.
        tokenizer: None if it has none.
        instance: the user's model, for a model in memory.
        options: how it was opened.
    """

    located: Located | None
    files: Snapshot | None
    label: str
    source: WeightSource
    skeleton: Skeleton
    tokenizer: Any
    instance: Any = None
    options: OpenOptions = field(default_factory=lambda: OpenOptions())

    @property
    def limit(self) -> int | None:
        """The longest sequence that the model was made for, in tokens; None if its config does not say."""
        return token_limit(self.skeleton.model.config)

    def check(self) -> None:
        """Raise `ValueError` if its files, or its weights in memory, have changed since it was opened."""
        self.source.check()
        if self.files is not None:
            self.files.check()

    @property
    def folder(self) -> Path | None:
        """The folder of its files; for a model in memory the one it was loaded from, if there is one."""
        if self.located is not None:
            return self.located.folder
        named = getattr(self.instance.config, "name_or_path", "")
        return Path(named) if named and Path(named).is_dir() else None

    @property
    def remote(self) -> bool:
        """Whether it came from the hub."""
        return bool(self.located and self.located.remote)


@dataclass(frozen=True, kw_only=True)
class OpenOptions:
    """How a model is opened.

    Attributes:
        tokenizer: used instead of the checkpoint's.
        revision: branch, tag or commit on the hub.
        device: `auto` or a device of torch.
        dtype: of forward passes, `auto` or a name.
        trust_remote_code: whether Python code of the checkpoint may run.
        blocks: the list of its blocks by name; None to find it.
        dequantize: read quantised weights as bfloat16.
    """

    tokenizer: Any = None
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    blocks: str | None = None
    dequantize: bool = False


def open_model(
    model: str | os.PathLike[str] | PreTrainedModel, options: OpenOptions = OpenOptions()
) -> Model:
    """Open a model, given as a name, folder or hub id, or in memory, without loading its weights.

    A model in memory is never changed.

    Raises:
        ValueError: an unknown name, a damaged or quantised checkpoint, or one without safetensors.
    """
    chosen = devices.choose_device(options.device)
    if not isinstance(model, (str, os.PathLike)):
        return _in_memory(model, options, chosen)
    trust, dequantize = options.trust_remote_code, options.dequantize
    check = functools.partial(check_folder, dequantize=dequantize)
    located = locate(str(model), options.revision, trust, check)
    config = read_config(located.folder, trust, dequantize)
    files, source = read_folder(located.folder, dequantize)
    stored = next((t.dtype for t in source.tensors.values() if t.dtype and len(t.shape) == 2), torch.float32)
    compute = devices.choose_dtype(options.dtype, chosen, stored)
    blocks = options.blocks or recorded_blocks(located.folder)
    skeleton = Skeleton(config, source, compute, chosen, trust, blocks)
    tokenizer = options.tokenizer or read_tokenizer(located.folder, trust)
    return Model(located, files, located.label, source, skeleton, tokenizer, options=options)


def read_folder(folder: Path, dequantize: bool = False) -> tuple[Snapshot, Source]:
    """The small files of a folder, and its weights: those of a packed folder, or one in bitmasks, as if they
    were dense.

    Raises:
        ValueError: weights that are missing, damaged, or stored in a type that cannot be pruned.
    """
    source: Source = Checkpoint(folder)
    files = Snapshot(folder)
    values = read_json(folder / CONFIG)
    if (entry := packing_entry(values)) is not None:
        source = Packed(Checkpoint(folder), entry)
        files = Snapshot(folder, {CONFIG: _dense_config})
    elif in_bitmasks(values) and not dequantize:
        source = Bitmasked(Checkpoint(folder))
        files = Snapshot(folder, {CONFIG: _dense_config})
    elif dequantize:
        source = Dequantised(Checkpoint(folder), dequantising(values, str(folder)))
        files = Snapshot(folder, {CONFIG: _dense_config})
    check_stored(source.tensors, str(folder))
    return files, source


def counting_skeleton(folder: Path, trust_remote_code: bool, blocks: str | None) -> Skeleton:
    """The skeleton of a folder whose weights are only counted; its tokenizer may be damaged."""
    config = read_config(folder, trust_remote_code)
    _, source = read_folder(folder)
    named = blocks or recorded_blocks(folder)
    return Skeleton(config, source, torch.float32, torch.device("cpu"), trust_remote_code, named)


def _dense_config(data: bytes) -> bytes:
    """The content of a config.json without what it says of quantisation."""
    return json.dumps(without_quantisation(json.loads(data)), indent=2).encode() + b"\n"


def recorded_blocks(folder: Path) -> str | None:
    """The list of blocks that the run named which made a folder; None where it named none."""
    if not (folder / RECORD).is_file():
        return None
    named = read_record(folder).get("model", {}).get("blocks")
    return named if isinstance(named, str) else None


def _in_memory(model: PreTrainedModel, options: OpenOptions, device: torch.device) -> Model:
    if options.dequantize:
        raise ValueError("dequantize is for a checkpoint's folder or name, not for a model in memory")
    check_whole(model)
    source = MemoryCheckpoint(model.state_dict())
    check_stored(source.tensors, "the model in memory")
    compute = devices.choose_dtype(options.dtype, device, model.dtype)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    skeleton = Skeleton(config, source, compute, device, blocks=options.blocks)
    label = Path(getattr(model.config, "name_or_path", "") or type(model).__name__).name
    return Model(None, None, label, source, skeleton, options.tokenizer, model, options)


def whole(model: Model) -> Any:
    """The whole model with its weights, on its device: for work that cannot be done block by block."""
    if model.instance is not None:  # a copy, since the user's model must not be changed
        return copy.deepcopy(model.instance).to(model.skeleton.device, model.skeleton.dtype).eval()
    import transformers

    assert model.located is not None
    if isinstance(model.source, (Dequantised, Packed, Bitmasked)):
        return _filled(model)
    auto = getattr(transformers, model.skeleton.auto_class)
    with libraries():
        loaded = auto.from_pretrained(
            model.located.folder,
            dtype=model.skeleton.dtype,
            use_safetensors=True,
            trust_remote_code=model.options.trust_remote_code,
        )
    model.check()  # transformers has read the files without the checks of our own reader
    return loaded.to(model.skeleton.device).eval()


def _filled(model: Model) -> Any:
    """A model of our own with all weights, where transformers would read them in another type."""
    assert model.located is not None
    old, trust = model.skeleton, model.options.trust_remote_code
    config = read_config(model.located.folder, trust, model.options.dequantize)
    new = Skeleton(config, model.source, old.dtype, old.device, trust, old.given_blocks)
    new.load(list(new.group_of))
    return new.model.eval()
