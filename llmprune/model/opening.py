"""Opening a model: name, folder, hub id or a model in memory becomes an empty skeleton over a lazy weight source."""

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
from llmprune.model.skeleton import Skeleton, check_dense, read_config
from llmprune.model.tokenizer import read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Model:
    """An opened model: where its weights are, its empty skeleton, its tokenizer (None: it has none).

    `located` and `files` (its small files as they were when it was opened) are None for a model in memory.
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
        """The longest sequence the model was made for, if its config says."""
        return getattr(self.skeleton.model.config.get_text_config(), "max_position_embeddings", None)

    def check(self) -> None:
        """Raise `ValueError` where the model's files, or its weights in memory, changed since it was opened."""
        self.source.check()
        if self.files is not None:
            self.files.check()

    @property
    def folder(self) -> Path | None:
        """Where its files are: of a model in memory the folder it was loaded from, None where there is none."""
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
    """Open a model lazily: name, folder, hub id, or a transformers model in memory (which is never written to).

    Raises:
        ValueError: an unknown name, a damaged or quantised checkpoint, one without safetensors.
    """
    chosen = devices.choose_device(device)
    if not isinstance(model, (str, os.PathLike)):
        check_dense(model.config.to_dict(), "the model in memory")
        source: WeightSource = MemoryCheckpoint(model)
        compute = devices.choose_dtype(dtype, chosen, model.dtype)
        skeleton = Skeleton(model.config, source, compute, chosen)
        label = Path(getattr(model.config, "name_or_path", "") or type(model).__name__).name
        return Model(None, None, label, source, skeleton, tokenizer, model)
    located = locate(str(model), revision, trust_remote_code)
    files = Snapshot(located.folder)
    config = read_config(located.folder, trust_remote_code)
    source = Checkpoint(located.folder)
    stored = next((t.dtype for t in source.tensors.values() if t.dtype and len(t.shape) == 2), torch.float32)
    compute = devices.choose_dtype(dtype, chosen, stored)
    skeleton = Skeleton(config, source, compute, chosen, trust_remote_code)
    tokenizer = tokenizer or read_tokenizer(located.folder, trust_remote_code)
    return Model(
        located, files, located.label, source, skeleton, tokenizer, trust_remote_code=trust_remote_code
    )


def whole(model: Model) -> Any:
    """The whole model in memory, on its device: for what cannot be streamed block by block."""
    if model.instance is not None:  # a copy, so that the user's stays as it is
        return copy.deepcopy(model.instance).to(model.skeleton.device, model.skeleton.dtype).eval()
    from transformers import AutoModelForCausalLM

    assert model.located is not None
    with libraries():
        loaded = AutoModelForCausalLM.from_pretrained(
            model.located.folder,
            dtype=model.skeleton.dtype,
            use_safetensors=True,
            trust_remote_code=model.trust_remote_code,
        )
    model.check()  # it was read past our own reader
    return loaded.to(model.skeleton.device).eval()
