"""The only file that may say "cuda": which device, which dtype, how much memory."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str = "auto") -> torch.device:
    """The device to compute on: a GPU where there is one, else the CPU. Raises `ValueError` for one this machine lacks."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device {name!r} is not available: torch sees {torch.cuda.device_count()} GPUs; use --device cpu")
    return device


def choose_dtype(name: str, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """The dtype of forward passes: float32 on a CPU, the checkpoint's own on a GPU, unless named.

    Raises:
        ValueError: an unknown name, or float16 on a CPU, whose matrix products there are some hundred times slower.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else stored
    if name not in DTYPES:
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, got {name!r}")
    if name == "float16" and device.type == "cpu":
        raise ValueError("dtype float16 is some hundred times slower than float32 on a CPU; use --dtype float32 or bfloat16")
    return DTYPES[name]


@contextmanager
def exact_matmul() -> Iterator[None]:
    """Full float32 products inside the `with`: TF32 would move masks."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB)"
    return f"CPU, {torch.get_num_threads()} threads"


def peak_memory() -> int:
    """Peak resident memory of this process since it started, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_device_memory(device: torch.device) -> None:
    """Start counting the GPU's peak anew; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_device_memory(device: torch.device) -> int | None:
    """Peak memory allocated on the GPU, in bytes; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
