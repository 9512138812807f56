"""Reads checkpoints lazily: names, shapes and dtypes are known at once, a tensor is loaded when asked for."""

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
from llmprune.checkpoint.files import DTYPES, NAMES, WeightFile, raw
from llmprune.common.messages import shown
from llmprune.numerics.counts import all_finite

_PRUNABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class TensorInfo(NamedTuple):
    """What is known of a stored tensor before it is loaded.

    `dtype` is None for types that cannot be pruned (integers, 8-bit floats); `stored` names the type, as
    safetensors does.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    bytes: int
    stored: str = ""

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


class WeightSource(Protocol):
    """Where weights come from: a folder or a model in memory."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors, by name."""
        ...

    def load(self, name: str) -> Tensor:
        """One tensor on the CPU, as stored. Raises `ValueError` if the source changed since it was opened."""
        ...

    def check(self) -> None:
        """Raise `ValueError` if the source changed since it was opened."""
        ...


class Checkpoint:
    """The safetensors files of one folder. They are checked first, and each time one of them is opened again.

    Raises:
        ValueError: no safetensors, a damaged header, or an index that names a missing file or one outside the
            folder.
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
                    f"{folder / INDEX} places {shown(sorted(missing)[0])} in {file}, which does not hold it; "
                    "download the checkpoint again"
                )

    def _listing(self) -> dict[str, set[str] | None]:
        """Shard file -> the tensors that the index places in it (None: there is no index)."""
        if (self.folder / SINGLE).is_file() and not (self.folder / INDEX).is_file():
            return {SINGLE: None}
        if not (self.folder / INDEX).is_file():
            raise ValueError(self._no_safetensors())
        weight_map = read_json(self.folder / INDEX).get("weight_map")
        usable = isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values())
        if not weight_map or not usable:
            raise ValueError(
                f"{self.folder / INDEX} has no usable weight_map (tensor name -> file); "
                "download the checkpoint again"
            )
        listing: dict[str, set[str] | None] = {}
        for name, file in weight_map.items():
            if not _is_file_name(file):
                raise ValueError(
                    f"{self.folder / INDEX} names {shown(file)} for {shown(name)}: "
                    "shards must be plain file names inside the folder"
                )
            tensors = listing.setdefault(file, set())
            assert tensors is not None
            tensors.add(name)
        return listing

    def _no_safetensors(self) -> str:
        """The message for a folder without safetensors."""
        pickles = [p.name for suffix in ("bin", "pt", "pth") for p in sorted(self.folder.glob(f"*.{suffix}"))]
        if pickles:
            return (
                f"{self.folder} has no safetensors, only {pickles[0]}, a pickle, which llmprune never opens; "
                "if you trust it, convert it: "
                "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
            )
        return f"{self.folder} has no {SINGLE} and no {INDEX}; expected a Hugging Face checkpoint folder"

    def _open(self, file: str) -> set[str]:
        """Open one weight file and take in its tensors; returns their names."""
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
                entry.shape, dtype if dtype in _PRUNABLE else None, entry.end - entry.start, entry.dtype
            )
        return set(weights.entries)

    @property
    def files(self) -> frozenset[str]:
        """The names of its weight files."""
        return frozenset(file.path.name for file in self._where.values())

    def file_of(self, name: str) -> str:
        """The name of the file that holds a tensor."""
        return self._where[name].path.name

    def load(self, name: str) -> Tensor:
        """One tensor on the CPU, as stored."""
        return self._where[name].load(name)

    def check(self) -> None:
        """Raise `ValueError` if a weight file has changed."""
        for file in dict.fromkeys(self._where.values()):
            file.check()


def _is_file_name(name: str) -> bool:
    """Whether a text is the plain name of a file, which cannot lead out of its folder."""
    # Not by resolving the path: in the hub's cache the files are links that lead out of the folder.
    too_long = len(name.encode(errors="replace")) > 255
    return name not in ("", ".", "..") and not too_long and not any(c in name for c in "/\\\0")


class MemoryCheckpoint:
    """The weights of a transformers model in memory; tied weights appear once, under their first name.

    Args:
        state: of the model, as its `state_dict` gives it.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, tensor in state.items():
            if tensor.is_meta:
                raise ValueError(
                    f"{name} of the model in memory is on the meta device (offloaded?); "
                    "load the model wholly or give its folder"
                )
            if tensor.data_ptr() not in seen or tensor.numel() == 0:
                self._state[name] = tensor
                seen.add(tensor.data_ptr())
        self._versions = {name: _version(tensor) for name, tensor in self._state.items()}
        self.tensors = {
            n: TensorInfo(
                tuple(t.shape), t.dtype if t.dtype in _PRUNABLE else None, t.nbytes, NAMES.get(t.dtype, "")
            )
            for n, t in self._state.items()
        }

    def load(self, name: str) -> Tensor:
        """One tensor on the CPU, as stored; a copy, so that the model is never written to."""
        tensor = self._state[name].detach().cpu().clone().contiguous()
        self._check(name)
        return tensor

    def check(self) -> None:
        """Raise `ValueError` if a weight was written to."""
        for name in self._state:
            self._check(name)

    def _check(self, name: str) -> None:
        if _version(self._state[name]) != self._versions[name]:
            raise ValueError(
                f"{name} of the model in memory changed during the run; begin anew once nothing writes to it"
            )


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to in place.

    Always 0 for one made in inference mode, as torch does not count.
    """
    return 0 if tensor.is_inference() else tensor._version


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises `ValueError`, naming the file, if it cannot be read or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a finished output folder.

    Raises `ValueError` if it is none, or of a later version of llmprune.
    """
    record = read_json(folder / RECORD)
    schema = record.get("schema")
    if isinstance(schema, int) and not isinstance(schema, bool) and schema > SCHEMA:
        raise ValueError(
            f"{folder / RECORD} has schema {shown(schema)}, and this llmprune reads schema {SCHEMA}; "
            "update llmprune"
        )
    if schema != SCHEMA or isinstance(schema, bool) or not _is_whole(record):
        raise ValueError(
            f"{folder / RECORD} is not a record of this program; remove it or restore the original"
        )
    return record


_SECTIONS = ("model", "recipe", "calibration", "evaluation", "totals", "environment", "recovery", "samples")


def _is_whole(record: Mapping[str, Any]) -> bool:
    """Whether the parts of a record that others read are of the right type, where they are there."""
    parts = [record.get(name) for name in _SECTIONS]
    if not all(part is None or isinstance(part, Mapping) for part in parts):
        return False
    rows, totals = record.get("matrices", []), record.get("totals") or {}
    named = isinstance(rows, list) and all(
        isinstance(row, Mapping) and isinstance(row.get("name"), str) for row in rows
    )
    share = totals.get("sparsity", 0.0)
    return named and isinstance(share, (int, float)) and not isinstance(share, bool)


def read_ahead(source: WeightSource, groups: Sequence[Sequence[str]]) -> Iterator[dict[str, Tensor]]:
    """The tensors of each group of names in turn; while one group is in use, a thread reads the next."""

    def load(names: Sequence[str]) -> dict[str, Tensor]:
        return {name: source.load(name) for name in names}

    with ThreadPoolExecutor(1, "read-ahead") as pool:
        coming = pool.submit(load, groups[0]) if groups else None
        for number in range(len(groups)):
            assert coming is not None
            tensors = coming.result()
            coming = pool.submit(load, groups[number + 1]) if number + 1 < len(groups) else None
            yield tensors
            del tensors  # frees the memory before the next group is waited for


def fingerprint(source: WeightSource) -> str:
    """SHA-256 over every tensor's name, shape, dtype and bytes; at most two tensors are in memory.

    Raises:
        ValueError: a tensor holds NaN or Inf; the message names the first one.
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
            f"weight {name!r} holds {bad} NaN or Inf values; the checkpoint is damaged, "
            "pruning it would spread them"
        )
