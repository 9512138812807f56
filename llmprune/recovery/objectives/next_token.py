"""Next token: the cross entropy of every token but the first, given those before it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from llmprune.recovery.parts import Objective, Outputs


class NextToken(Objective):
    """The mean over the tokens, in nats."""

    def size(self, tokens: Tensor, teacher: Outputs | None) -> float:
        return float(tokens.shape[0] * (tokens.shape[1] - 1))

    def total(self, student: Outputs, teacher: Outputs | None, tokens: Tensor) -> Tensor:
        assert student.logits is not None
        total = torch.zeros((), dtype=torch.float32, device=student.logits.device)
        for logits, row in zip(
            student.logits, tokens, strict=True
        ):  # float32 logits of one sequence at a time
            total = total + cross_entropy(logits[:-1].float(), row[1:], reduction="sum")
        return total
