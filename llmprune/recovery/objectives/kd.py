"""Distillation of logits (Hinton et al., arXiv 1503.02531): the student's next token as the teacher would
have it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.recovery.task import Objective, Outputs, over_tokens


class Kd(Objective):
    """KL = tau^2 sum_v p_v (log p_v - log q_v), mean over the tokens, with p of the teacher and q of the
    student.

    The factor tau^2 keeps the size of the gradient.
    """

    teaches = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of distillation.

        Attributes:
            tau: the temperature.
        """

        tau: float = 1.0

        def __post_init__(self) -> None:
            if not self.tau > 0:
                raise ValueError(f"tau must be above 0, got {self.tau}")

    def size(self, tokens: Tensor, teacher: Outputs | None) -> float:
        return float(tokens.numel())

    def total(self, student: Outputs, teacher: Outputs | None, tokens: Tensor) -> Tensor:
        assert student.logits is not None and teacher is not None and teacher.logits is not None
        total = torch.zeros((), dtype=torch.float32, device=student.logits.device)
        for own, wanted in zip(student.logits, teacher.logits, strict=True):
            total = total + over_tokens(self._divergence, own, wanted)
        return total

    def _divergence(self, own: Tensor, wanted: Tensor) -> Tensor:
        tau = self.config.tau
        q, p = ((logits.float() / tau).log_softmax(-1) for logits in (own, wanted))
        divergence: Tensor = tau**2 * (p.exp() * (p - q)).sum()
        return divergence
