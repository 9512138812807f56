"""Lazy reading of checkpoints: names, shapes and dtypes without loading; a tensor only when asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TensorInfo(NamedTuple):
    """What is known of a stored tensor before it is loaded. `dtype` is None for types no pruner handles (integers, 8-bit floats)."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    bytes: int

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


class WeightSource(Protocol):
    """Where weights come from: a folder or a model in memory."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """What there is, by name."""
        ...

    def load(self, name: str) -> Tensor:
        """One tensor on the CPU, as stored."""
        ...


class Checkpoint:
    """The safetensors files of one folder, checked before anything is loaded.

    Raises:
        ValueError: no safetensors, a damaged header, an index naming a missing file or one outside the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._where: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for file, wanted in self._listing().items():
            found = self._open(file)
            missing = wanted - found if wanted is not None else set()
            if missing:
                raise ValueError(
                    f"{folder / INDEX} places {sorted(missing)[0]!r} in {file}, which does not hold it; download the checkpoint again"
                )

    def _listing(self) -> dict[str, set[str] | None]:
        """Shard file -> the tensors an index promises in it (None: no index)."""
        if (self.folder / SINGLE).is_file() and not (self.folder / INDEX).is_file():
            return {SINGLE: None}
        if not (self.folder / INDEX).is_file():
            raise ValueError(self._no_safetensors())
        weight_map = read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
            raise ValueError(f"{self.folder / INDEX} has no usable weight_map (tensor name -> file); download the checkpoint again")
        listing: dict[str, set[str] | None] = {}
        for name, file in weight_map.items():
            # A plain file name cannot leave the folder. (Resolving instead would refuse the hub cache, whose files are links.)
            if file in ("", ".", "..") or "/" in file or "\\" in file or "\0" in file:
                raise ValueError(f"{self.folder / INDEX} names {file!r} for {name!r}: shards must be plain file names inside the folder")
            promised = listing.setdefault(file, set())
            assert promised is not None
            promised.add(name)
        return listing

    def _no_safetensors(self) -> str:
        pickles = [p.name for suffix in ("bin", "pt", "pth") for p in sorted(self.folder.glob(f"*.{suffix}"))]
        if pickles:
            return (
                f"{self.folder} has no safetensors, only {pickles[0]}, a pickle, which llmprune never opens; if you trust it, convert it: "
                "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
            )
        return f"{self.folder} has no {SINGLE} and no {INDEX}; expected a Hugging Face checkpoint folder"

    def _open(self, file: str) -> set[str]:
        path = self.folder / file
        if not path.is_file():
            raise ValueError(f"{self.folder / INDEX} names {file}, which is missing; download the checkpoint again")
        try:
            with safe_open(path, framework="pt") as handle:
                names = list(handle.keys())
                slices = {name: handle.get_slice(name) for name in names}
                infos = {n: (tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged or not safetensors ({error}); download the checkpoint again") from None
        for name, (shape, dtype) in infos.items():
            if name in self._where:
                raise ValueError(f"tensor {name!r} stands in both {self._where[name]} and {file}; the checkpoint is inconsistent")
            self._where[name] = file
            self.tensors[name] = TensorInfo(shape, _DTYPES.get(dtype), _size(shape, dtype))
        return set(names)

    @property
    def files(self) -> frozenset[str]:
        """The names of its weight files."""
        return frozenset(self._where.values())

    def load(self, name: str) -> Tensor:
        """One tensor on the CPU, as stored."""
        # Opened anew each time: a mapping kept open would hold every page ever read in memory.
        with safe_open(self.folder / self._where[name], framework="pt") as handle:
            return handle.get_tensor(name)  # type: ignore[no-any-return]


class MemoryCheckpoint:
    """The weights of a transformers model in memory; tied weights appear once, under their first name."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._state: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, tensor in model.state_dict().items():
            if tensor.is_meta:
                raise ValueError(
                    f"{name} of the model in memory is on the meta device (offloaded?); load the model wholly or give its folder"
                )
            if tensor.data_ptr() not in seen or tensor.numel() == 0:
                self._state[name] = tensor
                seen.add(tensor.data_ptr())
        self.tensors = {
            n: TensorInfo(tuple(t.shape), t.dtype if t.dtype in _DTYPES.values() else None, t.nbytes) for n, t in self._state.items()
        }

    def load(self, name: str) -> Tensor:
        """One tensor on the CPU, as stored; a copy, so that the model is never written to."""
        return self._state[name].detach().cpu().clone().contiguous()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `ValueError` naming the file otherwise."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def check_finite(source: WeightSource, names: list[str]) -> None:
    """Raise `ValueError` naming the first tensor with a NaN or Inf; one pass over the weights, one tensor in memory."""
    for name in names:
        # A sum is NaN or Inf as soon as one element is; only a suspicious sum (it may overflow) is looked at closely.
        tensor = source.load(name)
        if not bool(tensor.sum(dtype=torch.float32).isfinite()) and not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            raise ValueError(f"weight {name!r} holds {bad} NaN or Inf values; the checkpoint is damaged, pruning it would spread them")


def _size(shape: tuple[int, ...], dtype: str) -> int:
    bits = {"BOOL": 8, "I64": 64, "U64": 64, "I32": 32, "U32": 32, "I16": 16, "U16": 16, "I8": 8, "U8": 8}
    per = bits.get(dtype) or (torch.finfo(_DTYPES[dtype]).bits if dtype in _DTYPES else 8)
    return per // 8 * math.prod(shape)
