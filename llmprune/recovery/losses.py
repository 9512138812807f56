"""The loss of a batch and of the held-out sequences: sums of terms over some sequences at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.recovery.task import Outputs, Task, Term


@dataclass(frozen=True)
class Losses:
    """The loss of a task by some terms.

    A term is a sum over sequences, divided by the sum of their sizes over all sequences of a step, also those
    of other processes.
    """

    task: Task
    terms: tuple[Term, ...]

    def parts(self, rows: list[int]) -> list[list[int]]:
        """Those of the sequences that this process does, in parts that fit into memory."""
        mine, batch = self.task.mine(rows), self.task.batch
        return [mine[i : i + batch] for i in range(0, len(mine), batch)]

    def sizes(self, parts: list[list[int]]) -> list[float]:
        """What the sum of every term is divided by."""
        task, sizes = self.task, torch.zeros(len(self.terms), dtype=torch.float64)
        for part in parts:
            tokens = task.tokens(part)
            for number, term in enumerate(self.terms):
                outputs = None
                if term.objective.measures:
                    assert task.teacher is not None
                    outputs = task.teacher(part)
                sizes[number] += term.objective.size(tokens, outputs)
        task.add(sizes)
        return sizes.tolist()

    def of(self, weights: Mapping[str, Tensor], part: list[int], sizes: list[float]) -> Tensor:
        """The share of some sequences in the loss; gradients flow back to the weights."""
        tokens, teacher = self.task.tokens(part), self._taught(part)
        with torch.enable_grad():
            student = self.task.student(weights, part)
            loss = torch.zeros((), dtype=torch.float32, device=tokens.device)
            for term, size in zip(self.terms, sizes, strict=True):
                total = term.objective.total(student, teacher, tokens)
                loss = loss + term.weight / size * total.to(loss.device)
            return loss

    def _taught(self, part: list[int]) -> Outputs | None:
        """The teacher's outputs; None where no term compares with them."""
        if not any(term.objective.teaches for term in self.terms):
            return None
        assert self.task.teacher is not None
        with torch.no_grad():
            return self.task.teacher(part)

    @torch.no_grad()
    def held_out(self, weights: Mapping[str, Tensor]) -> float:
        """The loss on the held-out sequences."""
        task, sums = self.task, torch.zeros(2, len(self.terms), dtype=torch.float64)
        for part in self.parts(list(task.held)):
            tokens, teacher = task.tokens(part), self._taught(part)
            student = task.student(weights, part)
            for number, term in enumerate(self.terms):
                sums[0, number] += float(term.objective.total(student, teacher, tokens))
                sums[1, number] += term.objective.size(tokens, teacher)
        task.add(sums)
        return float(sum(term.weight * sums[0, i] / sums[1, i] for i, term in enumerate(self.terms)))
