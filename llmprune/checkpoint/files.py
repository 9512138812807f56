"""Reading and writing safetensors files: headers are checked, and a file is written completely or not at all.

"Durable" means: flushed to the disk, so that it survives a crash of the machine.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmprune.checkpoint.contents import TEMPORARY
from llmprune.common.messages import first_line

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
if hasattr(torch, "float8_e8m0fnu"):  # since torch 2.7
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """Where a tensor is in its file: bytes `start` to `end` from the beginning of the file.

    `dtype` as in safetensors.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor of a safetensors file, by name.

    Raises `ValueError` if the file is damaged or not safetensors.
    """
    try:
        # Opening makes the library's own checks: header size,
        # dtypes, shapes against offsets, gaps, overlaps, file size.
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            listed = json.loads(file.read(length))
        listed.pop("__metadata__", None)
        return {name: _entry(tensor, 8 + length) for name, tensor in listed.items()}
    except (SafetensorError, OSError, ValueError, RecursionError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged or not safetensors ({first_line(error)}); download it again"
        ) from None


def _entry(tensor: Mapping[str, Any], data: int) -> Entry:
    """One tensor of a header, given where the data begins in the file."""
    start, end = tensor["data_offsets"][0], tensor["data_offsets"][1]
    return Entry(tensor["dtype"], tuple(tensor["shape"]), data + start, data + end)


class Stamp(NamedTuple):
    """What the system says of a file; it differs if the file was changed or replaced."""

    device: int
    inode: int
    size: int
    modified: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        """The stamp from the result of `stat`."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def changed(path: Path) -> ValueError:
    """The error for a file that changed since the run began."""
    return ValueError(
        f"{path} changed during the run, so what was read before and after does not belong together; "
        "begin anew (--restart) once nothing writes to it"
    )


class WeightFile:
    """A safetensors file whose header is read once.

    Each later access checks that the file has not changed since.

    Raises:
        ValueError: the file is damaged, not safetensors, or changes while it is in use.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._stamp = Stamp.of(path.stat())
        except OSError as error:
            raise ValueError(f"cannot read {path}: {first_line(error)}") from None
        self.entries = read_header(path)
        self.check()

    def check(self) -> None:
        """Raise `ValueError` if the file has changed."""
        try:
            now = Stamp.of(self.path.stat())
        except OSError:
            raise changed(self.path) from None
        if now != self._stamp:
            raise changed(self.path)

    def load(self, name: str) -> Tensor:
        """One tensor, read into memory of its own.

        The file is not mapped into memory: if a mapped file is made shorter, reading it kills the process.
        """
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise ValueError(
                f"{name!r} in {self.path} is stored as {entry.dtype}, which is not supported; "
                "use a checkpoint in plain dtypes"
            )
        tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        buffer = _bytes(tensor) if tensor.numel() else memoryview(bytearray())
        try:
            with self.path.open("rb", buffering=0) as file:
                self._check_opened(file.fileno())
                file.seek(entry.start)
                while len(buffer):
                    read = file.readinto(buffer)
                    if not read:
                        raise changed(self.path)
                    buffer = buffer[read:]
                self._check_opened(file.fileno())  # it may have changed while it was read
        except FileNotFoundError:
            raise changed(self.path) from None
        except OSError as error:
            raise ValueError(f"cannot read {name!r} from {self.path}: {first_line(error)}") from None
        return tensor

    def _check_opened(self, handle: int) -> None:
        if Stamp.of(os.fstat(handle)) != self._stamp:
            raise changed(self.path)


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor, without a copy if it is contiguous."""
    return _bytes(tensor.contiguous()) if tensor.numel() else memoryview(b"")


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def layout(
    shapes: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, Entry]]:
    """The bytes of a safetensors header, and where each tensor's data will be.

    Args:
        shapes: name -> (dtype as in safetensors, shape), in the order in which the data will be written.
        metadata: of the file.
    """
    listed: dict[str, object] = {"__metadata__": dict(metadata)}
    spans, end = {}, 0
    for name, (dtype, shape) in shapes.items():
        start, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        spans[name] = Entry(dtype, shape, start, end)
        listed[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(listed, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    head = len(encoded).to_bytes(8, "little") + encoded
    data = len(head)
    return head, {
        name: span._replace(start=data + span.start, end=data + span.end) for name, span in spans.items()
    }


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write a safetensors file durably; returns its size in bytes and its SHA-256."""
    return save_made(path, {name: Made.of(tensor) for name, tensor in tensors.items()})


class Made(NamedTuple):
    """A tensor that is made when it is written, so that not all of a file are in memory at once."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Made:
        """A tensor that is there already."""
        return cls(tensor.dtype, tuple(tensor.shape), tensor.detach)


def save_made(path: Path, tensors: Mapping[str, Made]) -> tuple[int, str]:
    """As `save_tensors`, with tensors that are made one after the other."""
    # Wide dtypes first, so that every tensor starts at a multiple of its item size.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    head, _ = layout({n: (NAMES[tensors[n].dtype], tensors[n].shape) for n in order}, {"format": "pt"})
    return write_durably(path, itertools.chain([head], (raw(tensors[name].make().cpu()) for name in order)))


def write_durably(path: Path, chunks: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write a file durably; under its name it is complete or not there.

    Returns its size in bytes and its SHA-256.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    digest, size = hashlib.sha256(), 0
    temporary.unlink(missing_ok=True)  # if it is a link, nothing is written to where it leads
    with temporary.open("xb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)
    return size, digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renamed and removed files of a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
