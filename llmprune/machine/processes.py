"""Several processes on one run (`torchrun`, `accelerate launch`): dividing the work and joining the results.

The only file that uses `torch.distributed`. Processes are numbered by their rank, from 0. With a single
process every method works without communication.
"""

from __future__ import annotations

import atexit
import importlib
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
# The others wait for rank 0 while it scores tasks, however long that takes. A process that died is noticed by
# its closed connection, not by this limit.
_PATIENCE = timedelta(days=30)


# Parts of the messages with which torch.distributed reports that another process is gone.
_LOST_SIGNS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "NCCL",
    "Socket",
    "connectFullMesh",
)


class Team:
    """This process, number `rank` among `size` processes, and number `local_rank` on its machine."""

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.size, self._local_rank = rank, size, local_rank

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the one that writes files and messages."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.size == 1

    def share(self, items: int) -> slice:
        """This rank's part of `items` items; the parts are contiguous and in the order of ranks."""
        return slice(self.rank * items // self.size, (self.rank + 1) * items // self.size)

    def add(self, *tensors: Tensor) -> None:
        """Sum tensors over all ranks, in place."""
        if not self.alone:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def join_rows(self, rows: Tensor, counts: list[int]) -> Tensor:
        """The rows [n, C] of all ranks, concatenated in the order of ranks; rank r has counts[r] of them."""
        if self.alone:
            return rows
        parts = [rows.new_empty(n, *rows.shape[1:]) for n in counts]
        for rank, part in enumerate(parts):
            if rank == self.rank:
                part.copy_(rows)
            torch.distributed.broadcast(part, rank)
        return torch.cat(parts)

    def from_rank(self, rank: int, tensor: Tensor) -> None:
        """Overwrite a CPU tensor with the same tensor of rank `rank`, byte for byte."""
        if not self.alone:
            torch.distributed.broadcast(tensor.view(-1).view(torch.uint8), rank)

    def tell(self, value: T, rank: int = 0) -> T:
        """The value that one rank gave, returned on every rank."""
        if self.alone:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, rank)
        return box[0]

    def on_first(self, work: Callable[[], T]) -> T:
        """Do the work on rank 0 and return its result on every rank.

        An error of it is raised on every rank.
        """
        if self.alone:
            return work()
        value, raised = self.tell(_outcome(work) if self.first else (None, None))
        if raised is not None:
            raise raised
        return value  # type: ignore[return-value]

    def in_turn(self, work: Callable[[], T]) -> T:
        """Do the work on every rank, on the first one of each machine before the others.

        What the first one downloads, the others find in the cache. An error of any rank is raised on every
        rank, so that one that goes on after it does not wait for the others.
        """
        if self.alone:
            return work()
        value, own = None, None
        for leading in (True, False):
            if (self._local_rank == 0) == leading:
                value, own = _outcome(work)
            errors: list[BaseException | None] = [None] * self.size
            torch.distributed.all_gather_object(errors, own)
            if any(errors):
                raise own or next(filter(None, errors))
        return value  # type: ignore[return-value]


def _outcome(work: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """What work returns, or the error that it ends with."""
    try:
        return work(), None
    except (ValueError, RuntimeError, OSError, KeyboardInterrupt) as error:
        return None, error


ALONE = Team()


def current() -> Team:
    """The team of processes that this process was started in; the first call connects to the others."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        return Team()
    if not torch.distributed.is_available():
        raise ValueError(
            f"WORLD_SIZE is {size}, but this build of torch has no torch.distributed; start a single process"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if not torch.distributed.is_initialized():
        # Imported only after the group is made (as transformers does), this module keeps the group alive in
        # default arguments, and `_leave` could not end its threads.
        importlib.import_module("torch.distributed.nn")
        from llmprune.machine.device import use_local_device

        torch.distributed.init_process_group(use_local_device(local_rank), timeout=_PATIENCE)
        atexit.register(_leave)
    return Team(torch.distributed.get_rank(), torch.distributed.get_world_size(), local_rank)


def _leave() -> None:
    # A thread of the group that outlives the interpreter sometimes aborts a process that had finished.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def speaks() -> bool:
    """Whether this process should print the error of a failed run: True only on the first one that asks."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return os.environ.get("RANK", "0") == "0"
    try:
        store = torch.distributed.distributed_c10d._get_default_store()
        return bool(store.add("llmprune/failure", 1) == 1)
    except RuntimeError:  # the process that held the store has ended
        return torch.distributed.get_rank() == 0


def lost_process(error: BaseException) -> bool:
    """Whether an error of `torch.distributed` means that another process of the run has ended."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST_SIGNS)


def share_out(costs: dict[str, int], size: int) -> dict[str, int]:
    """Which of `size` ranks takes which item: the costliest first, each to the rank with the least work."""
    loads = [0] * size
    owner = {}
    for name in sorted(costs, key=lambda n: (-costs[n], n)):
        owner[name] = min(range(size), key=lambda r: (loads[r], r))
        loads[owner[name]] += costs[name]
    return owner
