"""Opens a model, given by name, folder, hub id or as a model in memory, without loading its weights."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune.checkpoint.reader import Checkpoint, MemoryCheckpoint, WeightSource
from llmprune.checkpoint.snapshot import Snapshot
from llmprune.hub.download import Located, locate
from llmprune.machine import device as devices
from llmprune.machine.state import libraries
from llmprune.model.config import check_folder, check_whole, read_config
from llmprune.model.quantised import check_stored
from llmprune.model.skeleton import Skeleton
from llmprune.model.tokenizer import read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        trust_remote_code: whether Python code of the checkpoint may run.
    """

    located: Located | None
    files: Snapshot | None
    label: str
    source: WeightSource
    skeleton: Skeleton
    tokenizer: Any
    instance: Any = None
    trust_remote_code: bool = False

    @property
    def limit(self) -> int | None:
        """The longest sequence that the model was made for, in tokens; None if its config does not say."""
        limit = getattr(self.skeleton.model.config.get_text_config(), "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

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


def open_model(
    model: str | os.PathLike[str] | PreTrainedModel,
    *,
    tokenizer: Any = None,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Model:
    """Open a model without loading its weights.

    Args:
        model: a name, folder or hub id, or a transformers model in memory, which is never changed.
        tokenizer: used instead of the checkpoint's.
        revision: branch, tag or commit on the hub.
        device: `auto` or a device of torch.
        dtype: of forward passes, `auto` or a name.
        trust_remote_code: whether Python code of the checkpoint may run.

    Raises:
        ValueError: an unknown name, a damaged or quantised checkpoint, or one without safetensors.
    """
    chosen = devices.choose_device(device)
    if not isinstance(model, (str, os.PathLike)):
        check_whole(model)
        source: WeightSource = MemoryCheckpoint(model)
        check_stored(source.tensors, "the model in memory")
        compute = devices.choose_dtype(dtype, chosen, model.dtype)
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        skeleton = Skeleton(config, source, compute, chosen)
        label = Path(getattr(model.config, "name_or_path", "") or type(model).__name__).name
        return Model(None, None, label, source, skeleton, tokenizer, model)
    located = locate(str(model), revision, trust_remote_code, check_folder)
    files = Snapshot(located.folder)
    config = read_config(located.folder, trust_remote_code)
    source = Checkpoint(located.folder)
    check_stored(source.tensors, str(located.folder))
    stored = next((t.dtype for t in source.tensors.values() if t.dtype and len(t.shape) == 2), torch.float32)
    compute = devices.choose_dtype(dtype, chosen, stored)
    skeleton = Skeleton(config, source, compute, chosen, trust_remote_code)
    tokenizer = tokenizer or read_tokenizer(located.folder, trust_remote_code)
    return Model(
        located, files, located.label, source, skeleton, tokenizer, trust_remote_code=trust_remote_code
    )


def whole(model: Model) -> Any:
    """The whole model with its weights, on its device: for work that cannot be done block by block."""
    if model.instance is not None:  # a copy, since the user's model must not be changed
        return copy.deepcopy(model.instance).to(model.skeleton.device, model.skeleton.dtype).eval()
    import transformers

    assert model.located is not None
    auto = getattr(transformers, model.skeleton.auto_class)
    with libraries():
        loaded = auto.from_pretrained(
            model.located.folder,
            dtype=model.skeleton.dtype,
            use_safetensors=True,
            trust_remote_code=model.trust_remote_code,
        )
    model.check()  # transformers has read the files without the checks of our own reader
    return loaded.to(model.skeleton.device).eval()
