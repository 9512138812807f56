"""Lazy reading of checkpoints: names, shapes and dtypes without loading; a tensor only when asked for."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from llmprune.checkpoint.contents import INDEX, RECORD, SCHEMA, SINGLE
from llmprune.checkpoint.files import DTYPES, WeightFile, raw
from llmprune.common.messages import shown
from llmprune.numerics.counts import all_finite

_PRUNABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


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
        """One tensor on the CPU, as stored. Raises `ValueError` where the source is not what it was when it was opened."""
        ...

    def check(self) -> None:
        """Raise `ValueError` where the source is not what it was when it was opened."""
        ...


class Checkpoint:
    """The safetensors files of one folder, checked before anything is loaded, and each time one of them is opened again.

    Raises:
        ValueError: no safetensors, a damaged header, an index naming a missing file or one outside the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._where: dict[str, WeightFile] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for file, wanted in self._listing().items():
            found = self._open(file)
            missing = wanted - found if wanted is not None else set()
            if missing:
                raise ValueError(
                    f"{folder / INDEX} places {shown(sorted(missing)[0])} in {file}, which does not hold it; download the checkpoint again"
                )

    def _listing(self) -> dict[str, set[str] | None]:
        """Shard file -> the tensors an index promises in it (None: no index)."""
        if (self.folder / SINGLE).is_file() and not (self.folder / INDEX).is_file():
            return {SINGLE: None}
        if not (self.folder / INDEX).is_file():
            raise ValueError(self._no_safetensors())
        weight_map = read_json(self.folder / INDEX).get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(f, str) for f in weight_map.values())
        ):
            raise ValueError(
                f"{self.folder / INDEX} has no usable weight_map (tensor name -> file); download the checkpoint again"
            )
        listing: dict[str, set[str] | None] = {}
        for name, file in weight_map.items():
            # A plain file name cannot leave the folder. (Resolving instead would refuse the hub cache, whose files are links.)
            if (
                file in ("", ".", "..")
                or len(file.encode(errors="replace")) > 255
                or any(c in file for c in "/\\\0")
            ):
                raise ValueError(
                    f"{self.folder / INDEX} names {shown(file)} for {shown(name)}: shards must be plain file names inside the folder"
                )
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
            raise ValueError(
                f"{self.folder / INDEX} names {file}, which is missing; download the checkpoint again"
            )
        weights = WeightFile(path)
        for name, entry in weights.entries.items():
            if name in self._where:
                other = self._where[name].path.name
                raise ValueError(
                    f"tensor {shown(name)} stands in both {other} and {file}; the checkpoint is inconsistent"
                )
            self._where[name] = weights
            dtype = DTYPES.get(entry.dtype)
            self.tensors[name] = TensorInfo(
                entry.shape, dtype if dtype in _PRUNABLE else None, entry.end - entry.start
            )
        return set(weights.entries)

    @property
    def files(self) -> frozenset[str]:
        """The names of its weight files."""
        return frozenset(file.path.name for file in self._where.values())

    def load(self, name: str) -> Tensor:
        """One tensor on the CPU, as stored."""
        return self._where[name].load(name)

    def check(self) -> None:
        """Raise `ValueError` where a weight file is not what it was."""
        for file in dict.fromkeys(self._where.values()):
            file.check()


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
        self._versions = {name: _version(tensor) for name, tensor in self._state.items()}
        self.tensors = {
            n: TensorInfo(tuple(t.shape), t.dtype if t.dtype in _PRUNABLE else None, t.nbytes)
            for n, t in self._state.items()
        }

    def load(self, name: str) -> Tensor:
        """One tensor on the CPU, as stored; a copy, so that the model is never written to."""
        tensor = self._state[name].detach().cpu().clone().contiguous()
        self._check(name)
        return tensor

    def check(self) -> None:
        """Raise `ValueError` where a weight was written to."""
        for name in self._state:
            self._check(name)

    def _check(self, name: str) -> None:
        if _version(self._state[name]) != self._versions[name]:
            raise ValueError(
                f"{name} of the model in memory changed during the run; begin anew once nothing writes to it"
            )


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to in place; always 0 for one made in inference mode, which is not counted."""
    return 0 if tensor.is_inference() else tensor._version


class Overlay:
    """A source some of whose tensors are read from other safetensors files."""

    def __init__(self, source: WeightSource, files: Sequence[Path]) -> None:
        self._source = source
        self._where = {name: file for file in map(WeightFile, files) for name in file.entries}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """What there is, by name."""
        return self._source.tensors

    def load(self, name: str) -> Tensor:
        """One tensor on the CPU, as stored."""
        return self._where[name].load(name) if name in self._where else self._source.load(name)

    def check(self) -> None:
        """Raise `ValueError` where something is not what it was."""
        self._source.check()
        for file in dict.fromkeys(self._where.values()):
            file.check()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `ValueError` naming the file otherwise."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a finished folder. Raises `ValueError` where it is none, or of a later version of this program."""
    record = read_json(folder / RECORD)
    schema = record.get("schema")
    if isinstance(schema, int) and not isinstance(schema, bool) and schema > SCHEMA:
        raise ValueError(
            f"{folder / RECORD} has schema {shown(schema)}, and this llmprune reads schema {SCHEMA}; update llmprune"
        )
    if schema != SCHEMA or isinstance(schema, bool):
        raise ValueError(
            f"{folder / RECORD} is not a record of this program; remove it or restore the original"
        )
    return record


def read_ahead(source: WeightSource, groups: Sequence[Sequence[str]]) -> Iterator[dict[str, Tensor]]:
    """The tensors of each group in turn; while one is in use a thread reads the next."""

    def load(names: Sequence[str]) -> dict[str, Tensor]:
        return {name: source.load(name) for name in names}

    with ThreadPoolExecutor(1, "read-ahead") as pool:
        coming = pool.submit(load, groups[0]) if groups else None
        for number in range(len(groups)):
            assert coming is not None
            tensors = coming.result()
            coming = pool.submit(load, groups[number + 1]) if number + 1 < len(groups) else None
            yield tensors
            del tensors  # not kept alive while the next group is waited for


def fingerprint(source: WeightSource) -> str:
    """SHA-256 over every tensor's name, shape, dtype and bytes; one pass over the weights, two tensors in memory.

    Raises:
        ValueError: naming the first tensor with a NaN or Inf.
    """
    names = sorted(source.tensors)
    whole = hashlib.sha256()
    with ThreadPoolExecutor(1, "hash") as pool:
        for tensors in read_ahead(source, [[name] for name in names]):
            for name, tensor in tensors.items():
                hashed = pool.submit(lambda data: hashlib.sha256(data).digest(), raw(tensor))
                _check_finite(name, tensor)
                whole.update(repr((name, list(tensor.shape), str(tensor.dtype))).encode() + hashed.result())
    return f"sha256:{whole.hexdigest()}"


def _check_finite(name: str, tensor: Tensor) -> None:
    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
        return
    if not all_finite(tensor):
        bad = int((~tensor.isfinite()).sum())
        raise ValueError(
            f"weight {name!r} holds {bad} NaN or Inf values; the checkpoint is damaged, pruning it would spread them"
        )
