"""SquareHead (Kurtic et al., arXiv 2310.06927): the outputs of all blocks, each compared with the
teacher's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.recovery.task import Objective, Outputs

EPS = torch.finfo(torch.bfloat16).eps


class Squarehead(Objective):
    """sum over the blocks of mean (H - H')^2 / (mean H'^2 + eps), H' of the teacher.

    Means are over the tokens of one sequence, and the loss is the mean over the sequences, so that it does
    not
    depend on how a batch is cut.
    """

    teaches = True
    looks = True

    def size(self, tokens: Tensor, teacher: Outputs | None) -> float:
        return float(len(tokens))

    def total(self, student: Outputs, teacher: Outputs | None, tokens: Tensor) -> Tensor:
        assert teacher is not None and student.hidden
        total = torch.zeros((), dtype=torch.float32, device=student.hidden[0].device)
        for own, wanted in zip(student.hidden, teacher.hidden, strict=True):
            axes = tuple(range(1, own.ndim))
            aim = wanted.float()
            error = (own.float() - aim).square().mean(axes)
            total = total + (error / (aim.square().mean(axes) + EPS)).sum()
        return total
