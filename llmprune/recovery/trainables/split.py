"""ELSA (arXiv 2510.01650): ADMM on the true loss. theta is dense and pulled towards z, its sparse
projection.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.contracts import Pattern
from llmprune.recovery.parts import Matrix, Trainable, View
from llmprune.recovery.phases import Phase


class Split(Trainable):
    """min L(theta) + penalty / 2 ||theta - z + u||^2; at each move z becomes the projection of theta + u,
    and u
    grows by theta - z.
    """

    revives = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of ELSA.

        Attributes:
            penalty: the weight of the pull.
        """

        penalty: float = 0.01

        def __post_init__(self) -> None:
            if not self.penalty > 0:
                raise ValueError(f"penalty must be above 0, got {self.penalty}")

    def sizes(self, shape: tuple[int, int], pattern: Pattern | None) -> tuple[int, int]:
        return shape[0] * shape[1], 2 * shape[0] * shape[1]

    def start(self, matrix: Matrix, generator: torch.Generator) -> None:
        theta = matrix.weight.detach().float()
        if matrix.origin is not None:
            theta = torch.where(matrix.keep, theta, matrix.origin().to(theta))
        self.tensors = {"theta": theta.clone().requires_grad_()}
        self.fixed = {"z": torch.where(matrix.keep, theta, 0.0), "u": torch.zeros_like(theta)}

    def weight(self, keep: Tensor, phase: Phase) -> Tensor:
        theta = self.tensors["theta"]
        return torch.where(keep, theta, 0.0) if phase.frozen else theta

    @torch.no_grad()
    def pull(self, part: str, phase: Phase) -> None:
        theta = self.tensors["theta"]
        if theta.grad is not None and not phase.frozen:
            theta.grad.add_(theta - self.fixed["z"] + self.fixed["u"], alpha=self.config.penalty)

    @torch.no_grad()
    def compared(self, keep: Tensor) -> Tensor:
        return self.tensors["theta"] + self.fixed["u"]

    @torch.no_grad()
    def moved(self, old: Tensor, new: Tensor, phase: Phase, view: View) -> None:
        theta = self.tensors["theta"]
        z = torch.where(new, theta + self.fixed["u"], 0.0)
        self.fixed, self.changed = {"z": z, "u": self.fixed["u"] + theta - z}, True
        if phase.frozen:
            theta.masked_fill_(~new, 0.0)

    @torch.no_grad()
    def settle(self, keep: Tensor, phase: Phase) -> None:
        if phase.frozen:
            self.tensors["theta"].masked_fill_(~keep, 0.0)

    def merge(self, keep: Tensor) -> Tensor:
        return torch.where(keep, self.tensors["theta"].detach(), 0.0)
