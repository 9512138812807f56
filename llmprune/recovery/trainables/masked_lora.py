"""Masked LoRA (PERP, arXiv 2312.15230; SparsePEFT of SQFT, arXiv 2410.03750; LoSA, arXiv 2502.14816): a
low-rank
change of the kept weights that fills no zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.contracts import Pattern
from llmprune.recovery.parts import Matrix, Trainable, View
from llmprune.recovery.phases import Phase


class MaskedLora(Trainable):
    """V = W' + (alpha / r) k * (B A), with B [R, r] zero and A [r, C] random at the start.

    When the mask moves, V becomes W', in float32, and a new B A begins (LoSA). W' is zero where it is pruned.
    """

    based = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of masked LoRA.

        Attributes:
            rank: r, the width of the change.
            alpha: its scale is alpha / rank.
        """

        rank: int = 16
        alpha: float = 32.0

        def __post_init__(self) -> None:
            if self.rank < 1:
                raise ValueError(f"rank must be at least 1, got {self.rank}")
            if not self.alpha > 0:
                raise ValueError(f"alpha must be above 0, got {self.alpha}")

    def sizes(self, shape: tuple[int, int], pattern: Pattern | None) -> tuple[int, int]:
        return self.config.rank * sum(shape), 0

    def start(self, matrix: Matrix, generator: torch.Generator) -> None:
        if matrix.weight.ndim != 2:
            raise ValueError(f"masked-lora trains matrices [R, C], got {list(matrix.weight.shape)}")
        self._generator = generator
        self.fixed = {"base": matrix.weight.detach() * matrix.keep}
        self._begin()

    def _begin(self) -> None:
        base, rank = self.fixed["base"], self.config.rank
        rows, columns = base.shape
        bound = math.sqrt(1 / columns)  # of nn.Linear, which is what Kaiming with a = sqrt(5) comes to
        a = torch.rand(rank, columns, generator=self._generator, dtype=torch.float32) * (2 * bound) - bound
        b = torch.zeros(rows, rank, dtype=torch.float32)
        self.tensors = {
            "a": a.to(base.device).requires_grad_(),
            "b": b.to(base.device).requires_grad_(),
        }

    def weight(self, keep: Tensor, phase: Phase) -> Tensor:
        change = (self.tensors["b"] * self._scale) @ self.tensors["a"]
        weight: Tensor = self.fixed["base"] + torch.where(keep, change, 0.0)
        return weight

    @property
    def _scale(self) -> float:
        return float(self.config.alpha / self.config.rank)

    def compared(self, keep: Tensor) -> Tensor:
        return self.merge(keep)

    @torch.no_grad()
    def merge(self, keep: Tensor) -> Tensor:
        return torch.where(keep, self.weight(keep, Phase(step=0)), 0.0)

    @torch.no_grad()
    def moved(self, old: Tensor, new: Tensor, phase: Phase, view: View) -> None:
        # Not in the dtype of the start: most changes are too small for bfloat16.
        self.fixed = {"base": torch.where(new, self.merge(old), 0.0)}
        self._generator, self.changed = view.generator, True
        self._begin()
