"""safetensors files byte by byte: checked headers, tensors read where they lie, and files that are whole and durable or not there."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

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
    "F8_E8M0": torch.float8_e8m0fnu,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """Where a tensor lies in its file: absolute bytes `start` to `end`."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor of a safetensors file. Raises `ValueError` where the file is damaged or something else."""
    try:
        with safe_open(path, framework="pt"):
            pass  # the library's own checks: header size, dtypes, shapes against offsets, no gap, no overlap, the file's length
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            listed = json.loads(file.read(length))
        listed.pop("__metadata__", None)
        return {
            name: Entry(
                t["dtype"],
                tuple(t["shape"]),
                8 + length + t["data_offsets"][0],
                8 + length + t["data_offsets"][1],
            )
            for name, t in listed.items()
        }
    except (SafetensorError, OSError, ValueError, RecursionError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged or not safetensors ({_line(error)}); download it again"
        ) from None


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


class Stamp(NamedTuple):
    """What tells one state of a file from another without reading it."""

    device: int
    inode: int
    size: int
    modified: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        """The stamp in what the system says of a file."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def changed(path: Path) -> ValueError:
    """The error for a file that is not what it was when the run began."""
    return ValueError(
        f"{path} changed during the run, so what was read before and after does not belong together; "
        "begin anew (--restart) once nothing writes to it"
    )


class WeightFile:
    """A safetensors file whose header is read once. Whenever it is opened again it must be the file it was then.

    Raises:
        ValueError: the file is damaged, something else, or changes while it is in use.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._stamp = Stamp.of(path.stat())
        except OSError as error:
            raise ValueError(f"cannot read {path}: {_line(error)}") from None
        self.entries = read_header(path)
        self.check()

    def check(self) -> None:
        """Raise `ValueError` where the file is not what it was."""
        try:
            now = Stamp.of(self.path.stat())
        except OSError:
            raise changed(self.path) from None
        if now != self._stamp:
            raise changed(self.path)

    def load(self, name: str) -> Tensor:
        """One tensor, copied into memory of its own: a mapping would die with the process when the file shrinks under it."""
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise ValueError(
                f"{name!r} in {self.path} is stored as {entry.dtype}, which is not supported; use a checkpoint in plain dtypes"
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
                self._check_opened(file.fileno())  # it may have been written to while it was read
        except FileNotFoundError:
            raise changed(self.path) from None
        except OSError as error:
            raise ValueError(f"cannot read {name!r} from {self.path}: {_line(error)}") from None
        return tensor

    def _check_opened(self, handle: int) -> None:
        if Stamp.of(os.fstat(handle)) != self._stamp:
            raise changed(self.path)


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor, not copied when it is contiguous."""
    return _bytes(tensor.contiguous()) if tensor.numel() else memoryview(b"")


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def layout(
    shapes: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, Entry]]:
    """The header of a safetensors file with these tensors (name -> dtype name, shape), in this order, and where each will lie."""
    listed: dict[str, object] = {"__metadata__": dict(metadata)}
    spans, end = {}, 0
    for name, (dtype, shape) in shapes.items():
        start, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        spans[name] = (dtype, shape, start, end)
        listed[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(listed, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    head = len(encoded).to_bytes(8, "little") + encoded
    return head, {
        name: Entry(dtype, shape, len(head) + start, len(head) + end)
        for name, (dtype, shape, start, end) in spans.items()
    }


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write a safetensors file durably; returns its bytes and SHA-256."""
    # Wide dtypes first: every tensor then starts at a multiple of its item size.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    head, _ = layout(
        {name: (_NAMES[tensors[name].dtype], tuple(tensors[name].shape)) for name in order}, {"format": "pt"}
    )
    return write_durably(path, [head, *(raw(tensors[name]) for name in order)])


def write_durably(path: Path, chunks: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write a file so that it is whole and on the disk under its name, or not there; returns its bytes and SHA-256."""
    temporary = path.with_name(f"{path.name}.tmp")
    digest, size = hashlib.sha256(), 0
    temporary.unlink(missing_ok=True)  # never written through, should it be a link
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
    """Make renames in a folder durable."""
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
