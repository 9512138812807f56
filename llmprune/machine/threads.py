"""Sets how many threads torch uses and how they wait for work, by environment variables.

Torch reads these when it is imported, so this file must run before that and must not import torch itself.
"""

from __future__ import annotations

import math
import os
from collections.abc import MutableMapping
from pathlib import Path

# If any of these is set, the user has chosen how threads wait.
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# How long a thread spins before it sleeps: rounds for GNU's OpenMP, milliseconds for Intel's and LLVM's.
# Sleeping at once made a run that has the machine to itself a third slower; spinning long, torch's default,
# made a run beside another program six times slower (docs/benchmarks.md).
_CALM = {"GOMP_SPINCOUNT": "20000", "KMP_BLOCKTIME": "1"}
_CGROUPS = Path("/sys/fs/cgroup")


def settle(environment: MutableMapping[str, str]) -> None:
    """Add torch's thread settings to an environment, as far as the user has not set them.

    Threads that wait for work soon sleep instead of spinning: beside another program, every short piece of
    parallel work would have to wait for a core on which a thread only spins. If the control group grants
    fewer processors than are visible, there are no more threads than that.
    """
    if not any(name in environment for name in _WAITING):
        environment.update(_CALM)
    quota, visible = granted_processors(), visible_processors()
    if "OMP_NUM_THREADS" not in environment and quota < visible:
        environment["OMP_NUM_THREADS"] = str(quota)


def usable_processors() -> int:
    """Processors that this process may use, by its affinity mask and by the quota of its control group."""
    return min(visible_processors(), granted_processors())


def visible_processors() -> int:
    """Processors in this process's affinity mask, or all of the machine if the system has no such masks."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def granted_processors(root: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """The CPU quota of the control groups in processors, rounded up.

    A very large number if there is no quota.
    """
    shares = [share for folder in _folders(root, own) if (share := _share(folder)) is not None]
    return max(1, math.ceil(min(shares) - 1e-9)) if shares else 1 << 30


def _folders(root: Path, own: Path) -> list[Path]:
    """The folders of this process's control group and of the groups above it, for cgroup versions 1 and 2."""
    try:
        lines = own.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    folders = [root, root / "cpu"]  # inside a container the root is the process's own group
    for line in lines:
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers == "" or "cpu" in controllers.split(","):
            base = root / "cpu" if controllers else root
            group = base / path.strip("/")
            folders += [group, *(parent for parent in group.parents if parent.is_relative_to(base))]
    return list(dict.fromkeys(folders))


def _share(folder: Path) -> float | None:
    """Processors that one control group grants; None if it sets no limit."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    try:
        share = float(quota) / float(period)
    except (ValueError, ZeroDivisionError):  # "max": no limit
        return None
    return share if share > 0 else None
