"""PST (Li et al., arXiv 2205.11005): a low-rank change of the weights, and a low-rank score beside their
size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.contracts import Pattern
from llmprune.recovery.masking import Chosen
from llmprune.recovery.parts import Matrix, Trainable
from llmprune.recovery.phases import Phase


class LowRankScore(Trainable):
    """theta = W + U Q, score = |theta| + A B + r 1^T + 1 c^T, V = theta * top(score).

    U and A are random at the start, the rest zero. The gradient of the score is G * theta, straight through,
    until masks are frozen.
    """

    revives = True

    based = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of PST.

        Attributes:
            rank: of the change of the weights.
            score_rank: of the score.
        """

        rank: int = 8
        score_rank: int = 8

        def __post_init__(self) -> None:
            for name in ("rank", "score_rank"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def sizes(self, shape: tuple[int, int], pattern: Pattern | None) -> tuple[int, int]:
        return (self.config.rank + self.config.score_rank + 1) * sum(shape), 0

    def start(self, matrix: Matrix, generator: torch.Generator) -> None:
        if matrix.weight.ndim != 2:
            raise ValueError(f"low-rank-score trains matrices [R, C], got {list(matrix.weight.shape)}")
        base = matrix.weight.detach()
        if matrix.origin is not None:
            base = torch.where(matrix.keep, base, matrix.origin().to(base))
        rows, columns = base.shape
        size = float(base.float().square().mean().sqrt()) or 1.0

        def drawn(*shape: int) -> Tensor:
            # Of the size of the weights, so that a step of the other factor changes them by its share.
            return (torch.randn(*shape, generator=generator, dtype=torch.float32) * size).to(base.device)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float32, device=base.device)

        c = self.config
        self.fixed = {"base": base}
        tensors = {
            "u": drawn(rows, c.rank),
            "q": zeros(c.rank, columns),
            "a": drawn(rows, c.score_rank),
            "b": zeros(c.score_rank, columns),
            "rows": zeros(rows, 1),
            "columns": zeros(1, columns),
        }
        self.tensors = {name: tensor.requires_grad_() for name, tensor in tensors.items()}

    def _theta(self) -> Tensor:
        theta: Tensor = self.fixed["base"].float() + self.tensors["u"] @ self.tensors["q"]
        return theta

    def _score(self, theta: Tensor) -> Tensor:
        t = self.tensors
        score: Tensor = theta.abs() + t["a"] @ t["b"] + t["rows"] + t["columns"]
        return score

    def weight(self, keep: Tensor, phase: Phase) -> Tensor:
        theta = self._theta()
        if phase.frozen:
            return torch.where(keep, theta, 0.0)
        weight: Tensor = Chosen.apply(theta, self._score(theta), keep)
        return weight

    @torch.no_grad()
    def learned(self, phase: Phase) -> Tensor | None:
        return self._score(self._theta())

    @torch.no_grad()
    def compared(self, keep: Tensor) -> Tensor:
        return self._theta()

    @torch.no_grad()
    def merge(self, keep: Tensor) -> Tensor:
        return torch.where(keep, self._theta(), 0.0)
