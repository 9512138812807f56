"""The native library: loaded once, when it is first wanted, and called through ctypes."""

from __future__ import annotations

import ctypes
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmprune.common.messages import first_line
from llmprune.kernels import build

NO_KERNEL = "no native kernel here: no speed-up"
PATHS = {"portable": 1, "neon": 2, "avx2": 3, "avx512": 4, "avx512-bf16": 5}  # the later, the faster
KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.int8: 3, torch.uint8: 4}  # uint8: int4
_VERSION = 2
_NAMES = {
    "portable": "plain C",
    "neon": "NEON",
    "avx2": "AVX2",
    "avx512": "AVX-512 with VNNI",
    "avx512-bf16": "AVX-512 with VNNI and BF16",
}
_lock = threading.Lock()
_kept: list[_Loaded] = []


class Matrix(ctypes.Structure):
    """A packed matrix as the C code takes it: `matrix` of packed.c."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("R", ctypes.c_int64),
        ("C", ctypes.c_int64),
        ("kind", ctypes.c_int32),
        ("wide", ctypes.c_int32),
    )


@dataclass(frozen=True)
class _Loaded:
    """What loading gave: a library, its best path, and why it has one thread; or why there is none."""

    library: ctypes.CDLL | None
    path: int
    reason: str


def available() -> bool:
    """Whether there is native code. The first call may compile it, which takes seconds."""
    return loaded().library is not None


def status() -> str:
    """Which path and how many threads products take; without native code, that there is none, and why."""
    state = loaded()
    if state.library is None:
        return f"{NO_KERNEL} ({state.reason})"
    name = next(_NAMES[name] for name, path in PATHS.items() if path == state.path)
    threads = 1 if state.reason else torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads > 1)}{state.reason and f' ({state.reason})'}"


def paths() -> list[str]:
    """The paths that this processor can take, the fastest last."""
    library = loaded().library
    return [] if library is None else [name for name, path in PATHS.items() if library.llmprune_has(path)]


def loaded() -> _Loaded:
    """The library, loaded or built on the first call."""
    if not _kept:
        with _lock:
            if not _kept:
                _kept.append(_load())
    return _kept[0]


def forget() -> None:
    """Lets the next call look for the library again."""
    with _lock:
        _kept.clear()


def native() -> ctypes.CDLL:
    """The library, where `available()`."""
    library = loaded().library
    assert library is not None
    return library


def matrix_of(tensors: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None], columns: int) -> Matrix:
    """Values, mask, row starts and scale of a packed matrix for the C code. The tensors must outlive it."""
    values, mask, rows, scale = tensors
    first = scale if mask is None else mask
    assert first is not None
    return Matrix(
        values.data_ptr(),
        None if mask is None else mask.data_ptr(),
        None if rows is None else rows.data_ptr(),
        None if scale is None else scale.data_ptr(),
        values.numel() * values.element_size(),
        first.shape[0],
        columns,
        KINDS[values.dtype],
        rows is not None and rows.dtype == torch.int64,
    )


def demand(code: int) -> None:
    """Raises for what a native function returned, unless all is well."""
    if code == 1:
        raise ValueError("the row starts do not fit the values: check the packed matrix")
    assert code == 0, f"the native code has no such path ({code})"


def _load() -> _Loaded:
    if sys.byteorder != "little":
        return _Loaded(None, 0, "the layout's words are little-endian, this machine is not")
    for path in build.candidates():
        try:
            return _bind(path)
        except (OSError, ValueError, AttributeError):
            continue  # from another machine, or damaged: built again
    try:
        return _bind(build.build())
    except (OSError, ValueError, AttributeError) as error:
        return _Loaded(None, 0, first_line(error))


def _bind(path: Path) -> _Loaded:
    library = ctypes.CDLL(str(path))
    library.llmprune_version.restype = ctypes.c_int
    if library.llmprune_version() != _VERSION:
        raise ValueError(f"{path} is of another version")
    pointer, many, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    matrix = ctypes.POINTER(Matrix)
    signatures = {
        "setup": (None, [pointer]),
        "has": (number, [number]),
        "scratch_bytes": (many, [matrix, number, many]),
        "tail_bytes": (many, [matrix]),
        "products": (number, [matrix, number, pointer, number, many, *[number] * 3, *[pointer] * 2, number]),
        "tiles": (number, []),
        "many_bytes": (many, [matrix, many, number]),
        "many": (number, [matrix, pointer, many, number, pointer, pointer]),
        "expand": (number, [matrix, many, many, number, number, number, pointer, pointer]),
        "compress": (number, [matrix, pointer, number, number, pointer]),
        "nibbles": (None, [matrix, pointer, pointer, pointer, number]),
        "counts": (number, [pointer, many, many, pointer, pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, f"llmprune_{name}")
        function.restype, function.argtypes = result, arguments
    parallel, reason = _parallel_for()
    library.llmprune_setup(parallel)
    return _Loaded(library, max(p for p in PATHS.values() if library.llmprune_has(p)), reason)


def _parallel_for() -> tuple[int | None, str]:
    """The address of torch's own way to share work among its threads (torch 2.10 and newer), or why not."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            function = ctypes.CDLL(str(folder / name)).torch_parallel_for
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value, ""
    return None, f"torch {torch.__version__} lends no threads, 2.10 does"
