"""Matrices stay as they are (PERP, arXiv 2312.15230): what is trained are the norms beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.contracts import Pattern
from llmprune.recovery.parts import Matrix, Trainable
from llmprune.recovery.phases import Phase


class Norms(Trainable):
    """V is the weight of the start; a recipe with this trains what its `others` names."""

    based = True

    def sizes(self, shape: tuple[int, int], pattern: Pattern | None) -> tuple[int, int]:
        return 0, 0

    def start(self, matrix: Matrix, generator: torch.Generator) -> None:
        self.fixed = {"base": matrix.weight.detach() * matrix.keep}

    def weight(self, keep: Tensor, phase: Phase) -> Tensor:
        return torch.where(keep, self.fixed["base"], 0.0)

    def compared(self, keep: Tensor) -> Tensor:
        return self.fixed["base"].float()

    def merge(self, keep: Tensor) -> Tensor:
        return torch.where(keep, self.fixed["base"].float(), 0.0)
