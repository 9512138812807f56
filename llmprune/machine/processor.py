"""What the processor of this machine is called, how much its last-level cache holds, and how busy it is."""

from __future__ import annotations

import platform
from pathlib import Path

_CPU = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_USUAL = 32 << 20  # where the system does not say


def processor_name(info: Path = Path("/proc/cpuinfo")) -> str:
    """The name of the processor as the system gives it; its architecture where it gives none."""
    try:
        lines = info.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(
        (" ".join(name.split()) for name in names if name), platform.processor() or platform.machine()
    )


def cache_bytes(folder: Path = _CPU) -> int:
    """Bytes of the last-level cache of the first core; 32 MiB where the system does not say."""
    found: dict[int, int] = {}
    for entry in sorted(folder.glob("index*")):
        try:
            kind, level = ((entry / name).read_text().strip() for name in ("type", "level"))
            size = (entry / "size").read_text().strip()
            if kind != "Instruction":
                found[int(level)] = int(size.rstrip("KMG")) * _UNITS.get(size[-1], 1)
        except (OSError, ValueError, IndexError):
            continue
    return found[max(found)] if found else _USUAL


def share_at_work(seconds: float = 0.3) -> float:
    """The share of the processors, 0 to 1, that programs take while this one waits for so long."""
    import psutil

    return round(float(psutil.cpu_percent(interval=seconds)) / 100, 3)
