"""SPP (Lu et al., arXiv 2405.16057): every kept weight is multiplied by a factor of its row and block of
columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.contracts import Pattern
from llmprune.recovery.parts import Matrix, Trainable
from llmprune.recovery.phases import Phase


class Scaled(Trainable):
    """V = W' * (1 + c a_i b_{floor(i n / R), j}), a [R, 1] zero and b [n, C] random at the start."""

    based = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of SPP.

        Attributes:
            groups: n, groups of rows that share a row of b.
            scale: c.
        """

        groups: int = 16
        scale: float = 2.0

        def __post_init__(self) -> None:
            if self.groups < 1:
                raise ValueError(f"groups must be at least 1, got {self.groups}")
            if not self.scale > 0:
                raise ValueError(f"scale must be above 0, got {self.scale}")

    def sizes(self, shape: tuple[int, int], pattern: Pattern | None) -> tuple[int, int]:
        return shape[0] + self.config.groups * shape[1], 0

    def start(self, matrix: Matrix, generator: torch.Generator) -> None:
        if matrix.weight.ndim != 2 or matrix.weight.shape[0] % self.config.groups:
            raise ValueError(
                f"scaled trains matrices whose rows are divisible by groups {self.config.groups}, "
                f"got {list(matrix.weight.shape)}; set trainable.groups"
            )
        base = matrix.weight.detach() * matrix.keep
        rows, columns = base.shape
        bound = (1 / columns) ** 0.5
        b = torch.rand(self.config.groups, columns, generator=generator, dtype=torch.float32)
        a = torch.zeros(rows, 1, dtype=torch.float32)
        self.fixed = {"base": base}
        self.tensors = {
            "a": a.to(base.device).requires_grad_(),
            "b": (b * (2 * bound) - bound).to(base.device).requires_grad_(),
        }

    def _factor(self) -> Tensor:
        a, b = self.tensors["a"], self.tensors["b"]
        spread = b.repeat_interleave(len(a) // self.config.groups, 0)
        factor: Tensor = 1 + self.config.scale * a * spread
        return factor

    def weight(self, keep: Tensor, phase: Phase) -> Tensor:
        return torch.where(keep, self.fixed["base"] * self._factor(), 0.0)

    def compared(self, keep: Tensor) -> Tensor:
        return self.merge(keep)

    @torch.no_grad()
    def merge(self, keep: Tensor) -> Tensor:
        return self.weight(keep, Phase(step=0))
