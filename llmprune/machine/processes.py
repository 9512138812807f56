"""Several processes on one run, started by `torchrun` or `accelerate launch`: who does what, and how results come together.

K processes (ranks). The only file that talks to torch.distributed; alone, every method is trivial.
"""

from __future__ import annotations

import atexit
import importlib
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
# Ranks wait for rank 0 while it scores tasks, however long that takes. A dead rank is noticed by its closed connection, not by this.
_PATIENCE = timedelta(days=30)


class Team:
    """This process among `size` processes. `alone`: there is only one."""

    def __init__(self, rank: int = 0, size: int = 1, nearby: int = 0) -> None:
        self.rank, self.size, self._nearby = rank, size, nearby

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the one that writes and speaks."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.size == 1

    def share(self, items: int) -> slice:
        """This rank's part of so many items: contiguous, in the order of ranks."""
        return slice(self.rank * items // self.size, (self.rank + 1) * items // self.size)

    def add(self, *tensors: Tensor) -> None:
        """Sum tensors over all ranks, in place."""
        if not self.alone:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def join_rows(self, rows: Tensor, counts: list[int]) -> Tensor:
        """The rows [n, C] of every rank below one another; rank r has counts[r]."""
        if self.alone:
            return rows
        parts = [rows.new_empty(n, *rows.shape[1:]) for n in counts]
        for rank, part in enumerate(parts):
            if rank == self.rank:
                part.copy_(rows)
            torch.distributed.broadcast(part, rank)
        return torch.cat(parts)

    def from_rank(self, rank: int, tensor: Tensor) -> None:
        """Fill a CPU tensor with that of a rank, byte for byte."""
        if not self.alone:
            torch.distributed.broadcast(tensor.view(-1).view(torch.uint8), rank)

    def tell(self, value: T, rank: int = 0) -> T:
        """The value of one rank, on every rank."""
        if self.alone:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, rank)
        return box[0]

    def on_first(self, work: Callable[[], T]) -> T:
        """What rank 0 gets from the work, on every rank; what it raises is raised on every rank."""
        if self.alone:
            return work()
        outcome: tuple[Any, BaseException | None] = (None, None)
        if self.first:
            try:
                outcome = (work(), None)
            except (ValueError, RuntimeError, OSError, KeyboardInterrupt) as error:
                outcome = (None, error)
        value, raised = self.tell(outcome)
        if raised is not None:
            raise raised
        return value  # type: ignore[no-any-return]

    def in_turn(self, work: Callable[[], T]) -> T:
        """Work on every rank, the first of each machine before the others: what it downloads, they find in the cache."""
        if self.alone:
            return work()
        value = work() if self._nearby == 0 else None
        torch.distributed.barrier()
        return value if self._nearby == 0 else work()  # type: ignore[return-value]


ALONE = Team()


def current() -> Team:
    """The team this process was started in; joins it on the first call."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        return Team()
    if not torch.distributed.is_available():
        raise ValueError(
            f"WORLD_SIZE is {size}, but this build of torch has no torch.distributed; start a single process"
        )
    if not torch.distributed.is_initialized():
        # Imported later (transformers does), its default arguments would hold the group, and `_leave` would not end its threads.
        importlib.import_module("torch.distributed.nn")
        from llmprune.machine.device import use_local_device

        backend = use_local_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.distributed.init_process_group(backend, timeout=_PATIENCE)
        atexit.register(_leave)
    return Team(
        torch.distributed.get_rank(),
        torch.distributed.get_world_size(),
        int(os.environ.get("LOCAL_RANK", "0")),
    )


def _leave() -> None:
    # A thread of the group that outlives the interpreter aborts the finished process now and then.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def speaks() -> bool:
    """True on the one process that tells of a failure: the first to ask."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return os.environ.get("RANK", "0") == "0"
    try:
        store = torch.distributed.distributed_c10d._get_default_store()
        return bool(store.add("llmprune/failure", 1) == 1)
    except RuntimeError:  # the store went down with its process
        return torch.distributed.get_rank() == 0


def lost_process(error: BaseException) -> bool:
    """Whether an error of a collective means that another process of the run is gone."""
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        sign in text
        for sign in (
            "Connection closed by peer",
            "Connection reset by peer",
            "Broken pipe",
            "NCCL",
            "Socket",
            "connectFullMesh",
        )
    )


def share_out(costs: dict[str, int], size: int) -> dict[str, int]:
    """Which rank takes which item: the costliest first, each to the rank with the least to do."""
    loads = [0] * size
    owner = {}
    for name in sorted(costs, key=lambda n: (-costs[n], n)):
        owner[name] = min(range(size), key=lambda r: (loads[r], r))
        loads[owner[name]] += costs[name]
    return owner
