"""Powerpropagation (Schwarz et al., arXiv 2110.00296): V = theta |theta|^(a - 1), so large weights grow
faster.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.recovery.masking import scaled
from llmprune.recovery.parts import Matrix, Trainable, View
from llmprune.recovery.phases import Phase


class Power(Trainable):
    """Starts at theta = sign(W) |W|^(1/a). Masks compare |V|. What is pruned never returns."""

    masked = frozenset({"theta"})

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of powerpropagation.

        Attributes:
            exponent: a; 1 is no reparametrisation.
        """

        exponent: float = 2.0

        def __post_init__(self) -> None:
            if self.exponent < 1:
                raise ValueError(f"exponent must be at least 1, got {self.exponent}")

    def start(self, matrix: Matrix, generator: torch.Generator) -> None:
        weight = torch.where(matrix.keep, matrix.weight.detach().float(), 0.0)
        theta = weight.sign() * weight.abs() ** (1 / self.config.exponent)
        self.tensors = {"theta": theta.requires_grad_()}

    def _power(self) -> Tensor:
        theta = self.tensors["theta"]
        # Not theta * |theta|^(a - 1), whose gradient is not finite where theta is zero.
        power: Tensor = theta.sign() * theta.abs() ** self.config.exponent
        return power

    def weight(self, keep: Tensor, phase: Phase) -> Tensor:
        return scaled(self._power(), keep, phase.numbers[0])

    @torch.no_grad()
    def compared(self, keep: Tensor) -> Tensor:
        return self._power()

    @torch.no_grad()
    def settle(self, keep: Tensor, phase: Phase) -> None:
        self.tensors["theta"].masked_fill_(~keep, 0.0)

    @torch.no_grad()
    def moved(self, old: Tensor, new: Tensor, phase: Phase, view: View) -> None:
        self.tensors["theta"].masked_fill_(~new, 0.0)

    @torch.no_grad()
    def merge(self, keep: Tensor) -> Tensor:
        return torch.where(keep, self._power(), 0.0)
