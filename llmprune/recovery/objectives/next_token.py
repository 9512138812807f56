"""Next token: the cross entropy of every token but the first, given those before it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from llmprune.recovery.task import Objective, Outputs, over_tokens


class NextToken(Objective):
    """The mean over the tokens, in nats."""

    def size(self, tokens: Tensor, teacher: Outputs | None) -> float:
        return float(tokens.shape[0] * (tokens.shape[1] - 1))

    def total(self, student: Outputs, teacher: Outputs | None, tokens: Tensor) -> Tensor:
        assert student.logits is not None
        total = torch.zeros((), dtype=torch.float32, device=student.logits.device)
        for logits, row in zip(student.logits, tokens, strict=True):
            total = total + over_tokens(_entropy, logits[:-1], row[1:])
        return total


def _entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    return cross_entropy(logits.float(), wanted, reduction="sum")
