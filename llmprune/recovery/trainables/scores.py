"""Lottery Jackpots (Zhang et al., arXiv 2104.08700): weights stay, a score per weight decides the mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.recovery.masking import Chosen
from llmprune.recovery.parts import Matrix, Trainable
from llmprune.recovery.phases import Phase


class Scores(Trainable):
    """V = W * top(S). S starts at 1 where a weight is kept and just below elsewhere; its gradient is G * W.

    Of a dense start the largest weights are kept at first.
    """

    based = True
    revives = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of learned scores.

        Attributes:
            low: the score of pruned weights at the start.
            relative: divide the gradient of the scores by the root mean square of the matrix's weights, so
                that one learning rate fits models with weights of any size.
        """

        low: float = 0.99
        relative: bool = True

        def __post_init__(self) -> None:
            if not 0 <= self.low < 1:
                raise ValueError(f"low must be in [0, 1), got {self.low}")

    def start(self, matrix: Matrix, generator: torch.Generator) -> None:
        base = matrix.weight.detach()
        if matrix.origin is not None:
            base = torch.where(matrix.keep, base, matrix.origin().to(base))
        score = torch.where(matrix.first_mask(), 1.0, float(self.config.low)).to(torch.float32)
        self.fixed = {"base": base}
        self.tensors = {"score": score.requires_grad_()}

    def weight(self, keep: Tensor, phase: Phase) -> Tensor:
        base = self.fixed["base"].float()
        if phase.frozen:
            return torch.where(keep, base, 0.0)
        weight: Tensor = Chosen.apply(base, self.tensors["score"], keep)
        return weight

    @torch.no_grad()
    def pull(self, part: str, phase: Phase) -> None:
        gradient = self.tensors["score"].grad
        if self.config.relative and gradient is not None:
            size = float(self.fixed["base"].float().square().mean().sqrt())
            gradient.div_(size or 1.0)

    def learned(self, phase: Phase) -> Tensor | None:
        return self.tensors["score"].detach()

    def compared(self, keep: Tensor) -> Tensor:
        return self.fixed["base"].float()

    def merge(self, keep: Tensor) -> Tensor:
        return torch.where(keep, self.fixed["base"].float(), 0.0)
