"""The device of a run: which one, in which dtype, how much memory it has, how fast it is.

This is the only file of the package that may use `torch.cuda`.
"""

from __future__ import annotations

import ctypes
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import torch

from llmprune.machine.state import Setting

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str = "auto") -> torch.device:
    """The device to compute on; with `auto` a GPU if there is one, else the CPU.

    Raises:
        ValueError: not the name of a device, or of one that this machine does not have.
    """
    if name == "auto":
        gpu = torch.cuda.is_available()
        return torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (
        not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise ValueError(
            f"device {name!r} is not available: torch sees {torch.cuda.device_count()} GPUs; use --device cpu"
        )
    return device


def choose_dtype(name: str, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """The dtype of forward passes; with `auto` the stored one if the device multiplies it fast, else float32.

    Raises:
        ValueError: an unknown name, or float16 on a CPU, where its matrix products are some hundred times
            slower.
    """
    if name == "auto":
        fast_bfloat16 = stored == torch.bfloat16 and has_bfloat16_units()
        fast = device.type == "cuda" or stored == torch.float32 or fast_bfloat16
        return stored if fast else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, got {name!r}")
    if name == "float16" and device.type == "cpu":
        raise ValueError(
            "dtype float16 is some hundred times slower than float32 on a CPU; "
            "use --dtype float32 or bfloat16"
        )
    return DTYPES[name]


def has_bfloat16_units() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware, faster than float32: AMX, or AVX-512 BF16.

    Intel's AVX-512 BF16 without AMX (a virtual machine may hide it) has half of float32's rate: 84 and 150
    GFLOP/s were measured on a core.
    """
    units = torch.cpu.get_capabilities()
    intel = str(units.get("cpu_name", "")).startswith("Intel")
    return bool(units.get("amx_bf16") or (units.get("avx512_bf16") and not intel))


def use_local_device(number: int) -> str:
    """Use GPU `number` of this machine in this process, if it has GPUs.

    Returns the backend for torch.distributed.

    Raises:
        ValueError: the machine has GPUs, but no such number.
    """
    if not torch.cuda.is_available():
        return "gloo"
    if number >= torch.cuda.device_count():
        raise ValueError(
            f"process {number} of this machine has no GPU: torch sees {torch.cuda.device_count()}; "
            "start fewer processes"
        )
    torch.cuda.set_device(number)
    return "cpu:gloo,cuda:nccl"


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the device or on the host."""
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


def free_cached_memory(device: torch.device) -> None:
    """Give back memory kept for reuse: on a GPU by torch, on the host by the C library if that is glibc."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)


def _set_tf32(allowed: object) -> None:
    torch.backends.cuda.matmul.allow_tf32 = bool(allowed)


_EXACT = Setting(lambda: torch.backends.cuda.matmul.allow_tf32, _set_tf32, False)


def exact_matmul() -> AbstractContextManager[None]:
    """Compute float32 matrix products in full precision inside the `with`: with TF32 masks would differ."""
    return _EXACT.held()


def describe(device: torch.device) -> str:
    """The device in words, for the record: its name and memory, or the number of threads of a CPU."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        return f"{torch.cuda.get_device_name(device)} ({memory:.0f} GiB)"
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def peak_memory() -> int:
    """Peak resident memory of this process since it started, including pages of mapped files, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kibibytes


class PrivateMemory:
    """Measures the peak of the resident memory without pages of mapped files, in bytes, inside a `with`.

    The kernel keeps no such peak, so a thread reads the current value every now and then. `peak` is None
    where the system does not report these pages separately.
    """

    _EVERY = 0.02  # seconds between two readings

    def __init__(self) -> None:
        self.peak = self._now()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> PrivateMemory:
        if self.peak is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(self._EVERY):
            self.peak = max(self.peak or 0, self._now() or 0)

    @staticmethod
    def _now() -> int | None:
        try:
            status = Path("/proc/self/status").read_text()
        except OSError:
            return None
        lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        if "RssAnon" not in lines:
            return None
        return sum(int(lines[key].split()[0]) for key in ("RssAnon", "RssShmem") if key in lines) * 1024


def available_memory() -> int:
    """Host memory that this process may still use, in bytes, within the limit of its control group."""
    import psutil

    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        return free if limit == "max" else max(0, min(free, int(limit) - int(used)))
    except (OSError, ValueError):
        return free


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of matrix products on this device: the best of a few measurements.

    A multiply-add counts as two operations.
    """
    a = torch.ones(1024, 1024, device=device, dtype=dtype)
    return 2 * 1024**3 / _best_time(device, lambda: a @ a, 4)


def visit_seconds(device: torch.device) -> float:
    """Seconds to read, change and write one float32 entry of a large matrix."""
    a = torch.ones(2048, 1024, device=device, dtype=torch.float32)
    return _best_time(device, lambda: torch.add(a, a), 5) / a.numel()


def eigh_seconds(device: torch.device, size: int) -> float:
    """Seconds of one eigendecomposition of a [size, size] matrix in float64.

    Above a size of 512 they are extrapolated: the work grows with the cube of the size.
    """
    small = min(size, 512)
    matrix = torch.ones(small, small, device=device, dtype=torch.float64)
    matrix = torch.eye(small, device=device, dtype=torch.float64) + matrix
    return _best_time(device, lambda: torch.linalg.eigh(matrix), 2) * (size / small) ** 3


def _best_time(device: torch.device, work: Callable[[], object], times: int) -> float:
    """The shortest time, in seconds, that the work took out of several runs."""
    best = float("inf")
    for _ in range(times):
        wait_for(device)
        started = time.perf_counter()
        work()
        wait_for(device)
        best = min(best, time.perf_counter() - started)
    return max(best, 1e-9)


def on_nvidia(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies on a GPU of NVIDIA."""
    return tensor.is_cuda and torch.version.hip is None


def seconds_of(call: Callable[[], object], device: torch.device, times: int = 20) -> float:
    """Seconds of a call, the median of several.

    On a GPU it is the time between two events on the device, as inside a CUDA graph: the host's time to
    launch is not in it. The GPU's cache is overwritten before each call, so that weights come from memory.
    """
    for _ in range(3):
        call()
    if device.type != "cuda":
        found = []
        for _ in range(times):
            started = time.perf_counter()
            call()
            found.append(time.perf_counter() - started)
        return statistics.median(found)
    pairs = []
    with torch.cuda.device(device):
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        other = torch.empty(max(2 * cache, 256 << 20), dtype=torch.uint8, device=device)
        for _ in range(times):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            other.zero_()
            begin.record()
            call()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize(device)
    return statistics.median(float(begin.elapsed_time(end)) / 1000 for begin, end in pairs)


def free_memory(device: torch.device) -> int:
    """Memory of the device that this process may still use, in bytes: the GPU's, or the host's for a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


class Stopwatch:
    """Adds up the seconds spent inside `with` blocks.

    On a GPU they are measured by its own clock, so that the host need not wait.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._seconds = 0.0
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Add the time spent inside the `with`."""
        if self._gpu:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._pairs.append((begin, end))
        else:
            started = time.monotonic()
            yield
            self._seconds += time.monotonic() - started

    def take(self) -> float:
        """The seconds so far; the watch starts again from zero."""
        if self._pairs:
            self._pairs[-1][1].synchronize()
        total: float = self._seconds + sum(a.elapsed_time(b) for a, b in self._pairs) / 1000
        self._seconds, self._pairs = 0.0, []
        return total


def wait_for(device: torch.device) -> None:
    """Wait until the GPU has finished all its work; does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_device_memory(device: torch.device) -> None:
    """Start measuring the GPU's peak memory anew; does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_device_memory(device: torch.device) -> int | None:
    """Peak memory allocated on the GPU, in bytes; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
