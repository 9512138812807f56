"""Sparse Model Soups (Zimmer et al., arXiv 2306.16788): copies with the same masks, trained apart, averaged.

Where the masks are equal, the average is exactly as sparse as each copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from llmprune.contracts import Pattern
from llmprune.recovery.loop import Loop
from llmprune.recovery.parts import Matrix
from llmprune.recovery.phases import Phase
from llmprune.recovery.task import Task


class Soup:
    """The sum of the copies of a phase, and where the copies of this phase start."""

    def __init__(self) -> None:
        self._count = 0
        self._sums: dict[str, Tensor] = {}
        self._base: dict[str, Tensor] = {}

    def begin(self, task: Task) -> None:
        """The next copies start from a task's weights."""
        self._base = {f"weight/{name}": matrix.weight for name, matrix in task.matrices.items()}
        self._base |= {f"keep/{name}": matrix.keep for name, matrix in task.matrices.items()}
        self._base |= {f"other/{name}": tensor for name, tensor in task.others.items()}
        self._count, self._sums = 0, {}

    def task(self, task: Task) -> Task:
        """A task with the weights that the copies of this phase start from."""
        return _with(task, self._base)

    def add(self, loop: Loop) -> None:
        """Add a copy that is trained.

        Raises:
            ValueError: its masks are other ones than those of the copies before.
        """
        self._count += 1
        for name in loop.trained:
            keep = loop.keeps[name]
            if not torch.equal(keep, self._base[f"keep/{name}"].to(keep.device)):
                raise ValueError(
                    "copies of a soup must keep their masks, and this recipe moves them; take one copy"
                )
            self._add(f"weight/{name}", loop.merged(name))
        for name, tensor in loop.others.items():
            self._add(f"other/{name}", tensor.detach())

    def _add(self, key: str, tensor: Tensor) -> None:
        before = self._sums.get(key)
        self._sums[key] = tensor.clone() if before is None else before.to(tensor.device) + tensor

    def averaged(self, task: Task) -> Task:
        """A task with the average of the copies; unchanged where there is none yet."""
        if not self._count:
            return task
        found = {key: total / self._count for key, total in self._sums.items()}
        return _with(task, {**self._base, **found})

    def saved(self) -> dict[str, Tensor]:
        """What must be known to go on."""
        parts = {"sum": self._sums, "base": self._base}
        tensors = {
            f"soup/{part}/{k}": t.contiguous() for part, group in parts.items() for k, t in group.items()
        }
        return {**tensors, "soup/count/": torch.tensor([self._count])}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `saved` returned, which may lie on another device than the copies."""
        for key, tensor in tensors.items():
            _, part, name = key.split("/", 2)
            if part == "count":
                self._count = int(tensor)
            else:
                (self._sums if part == "sum" else self._base)[name] = tensor


def _with(task: Task, tensors: Mapping[str, Tensor]) -> Task:
    """A task that starts from other weights and masks."""
    matrices = {
        name: dataclasses.replace(
            matrix,
            weight=tensors[f"weight/{name}"].to(matrix.weight.device),
            keep=tensors[f"keep/{name}"].to(matrix.keep.device),
        )
        for name, matrix in task.matrices.items()
    }
    others = {name: tensors[f"other/{name}"].to(tensor.device) for name, tensor in task.others.items()}
    return dataclasses.replace(task, matrices=matrices, others=others)


def part_pruned(task: Task, phase: int, phases: int) -> Task:
    """A task whose matrices are pruned by magnitude to the sparsity of a phase, counted from 0.

    Every phase prunes the same share of what is left: `1 - (1 - s)^((phase + 1) / phases)` in all. What is
    sparser already stays as it is.
    """
    matrices = {name: _pruned(matrix, phase, phases) for name, matrix in task.matrices.items()}
    return dataclasses.replace(task, matrices=matrices)


def _pruned(matrix: Matrix, phase: int, phases: int) -> Matrix:
    wanted = 1 - (1 - matrix.sparsity) ** ((phase + 1) / phases)
    last = phase + 1 == phases
    aim = matrix.aim(Phase(step=0, reach=1.0 if last else 0.0, initial=wanted))
    if aim is None or _enough(matrix, aim, last):
        return matrix
    score = torch.where(matrix.keep, matrix.weight.float().abs(), -1.0)
    keep = aim[0].select(score, aim[1])
    return dataclasses.replace(matrix, keep=keep, weight=matrix.weight * keep)


def _enough(matrix: Matrix, aim: tuple[Pattern, float], last: bool) -> bool:
    """Whether a mask stays: it prunes the share of its phase, and at last it has pattern and counts too."""
    if last:
        try:
            aim[0].check(matrix.keep, aim[1])
        except ValueError:
            return False
        return True
    return 1 - int(matrix.keep.sum()) / matrix.keep.numel() >= aim[1] - 1e-6
