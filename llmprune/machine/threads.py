"""How many threads torch gets, and how they wait. Imports nothing heavy: torch reads these settings when it is imported."""

from __future__ import annotations

import math
import os
from collections.abc import MutableMapping
from pathlib import Path

# Any of these is the user's own choice of how threads wait.
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# Rounds of waiting before a thread sleeps. To sleep at once made a run alone a third slower, to spin for long (torch's own way) made
# it six times slower beside another program; see docs/benchmarks.md. The second is for Intel's and LLVM's OpenMP, in milliseconds.
_CALM = {"GOMP_SPINCOUNT": "20000", "KMP_BLOCKTIME": "1"}
_CGROUPS = Path("/sys/fs/cgroup")


def settle(environment: MutableMapping[str, str]) -> None:
    """Put torch's thread settings into an environment, where the user has not chosen: torch and child processes read them.

    Threads that wait for work go to sleep soon instead of spinning: beside another program, spinning makes every short
    piece of parallel work wait for a core that only spins. Where the control group grants fewer processors than can be
    seen, there are no more threads than that.
    """
    if not any(name in environment for name in _WAITING):
        environment.update(_CALM)
    quota, visible = granted_processors(), visible_processors()
    if "OMP_NUM_THREADS" not in environment and quota < visible:
        environment["OMP_NUM_THREADS"] = str(quota)


def usable_processors() -> int:
    """Processors this process may use: those of its affinity mask, or fewer where its control group has a quota."""
    return min(visible_processors(), granted_processors())


def visible_processors() -> int:
    """Processors in the affinity mask, or of the machine where the system has no such mask."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def granted_processors(root: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """Processors that the control groups' CPU quotas amount to, rounded up; a very large number where there is none."""
    shares = [share for folder in _folders(root, own) if (share := _share(folder)) is not None]
    return max(1, math.ceil(min(shares) - 1e-9)) if shares else 1 << 30


def _folders(root: Path, own: Path) -> list[Path]:
    """The folders of this process's control group and of those above it, of version 2 and of version 1."""
    try:
        lines = own.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    folders = [root, root / "cpu"]  # inside a container its own group is the root
    for line in lines:
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers == "" or "cpu" in controllers.split(","):
            base = root / "cpu" if controllers else root
            group = base / path.strip("/")
            folders += [group, *(parent for parent in group.parents if parent.is_relative_to(base))]
    return list(dict.fromkeys(folders))


def _share(folder: Path) -> float | None:
    """Processors that one control group grants; None where it sets no limit."""
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
