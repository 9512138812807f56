"""Kept weights: those that a mask keeps, in float32, with nothing left of those it prunes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.recovery.compact import Expanded, Places
from llmprune.recovery.masking import Masked
from llmprune.recovery.parts import Matrix, Trainable, View
from llmprune.recovery.phases import Phase

_DENSE = 0.9  # the share of kept weights from which there is little to gain


class Kept(Trainable):
    """V is theta, zero where it is pruned. Where no mask moves, theta has its kept values alone."""

    masked = frozenset({"theta"})
    shrinks = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of kept weights.

        Attributes:
            grown: where a weight that is kept anew starts: at `zero`, or at the dense model's (`dense`).
        """

        grown: str = "zero"

        def __post_init__(self) -> None:
            if self.grown not in ("zero", "dense"):
                raise ValueError(f"grown must be zero or dense, got {self.grown!r}")

    def start(self, matrix: Matrix, generator: torch.Generator) -> None:
        if self.config.grown == "dense" and matrix.origin is None:
            raise ValueError("grown weights start at the dense model's; name it with --teacher")
        self._origin = matrix.origin
        self._places: Places | None = None
        weight, keep = matrix.weight.detach(), matrix.keep
        if self.shrinks and matrix.still and weight.ndim == 2 and keep.sum() < _DENSE * keep.numel():
            self._places, self.masked = Places(keep), frozenset()
            theta = self._places.values(weight.float())
        else:
            theta = weight.to(torch.float32, copy=True).masked_fill_(~keep, 0.0)
        self.tensors = {"theta": theta.requires_grad_()}

    def weight(self, keep: Tensor, phase: Phase) -> Tensor:
        beta, gamma, _, _ = phase.numbers
        theta, places = self.tensors["theta"], self._places
        weight: Tensor = (
            Masked.apply(theta, keep, beta, gamma) if places is None else Expanded.apply(theta, places)
        )
        return weight

    def compared(self, keep: Tensor) -> Tensor:
        return self.merge(keep) if self._places else self.tensors["theta"].detach()

    @torch.no_grad()
    def settle(self, keep: Tensor, phase: Phase) -> None:
        rho = phase.numbers[3]
        if rho < 1 and self._places is None:
            theta = self.tensors["theta"]
            theta.copy_(torch.where(keep, theta, theta * rho if rho else 0.0))

    @torch.no_grad()
    def moved(self, old: Tensor, new: Tensor, phase: Phase, view: View) -> None:
        theta = self.tensors["theta"]
        if phase.numbers[3] == 0:  # else what is pruned keeps its last value
            theta.masked_fill_(~new, 0.0)
        if self.config.grown == "dense" and self._origin is not None:
            theta.copy_(torch.where(new & ~old, self._origin().to(theta), theta))

    def merge(self, keep: Tensor) -> Tensor:
        theta = self.tensors["theta"].detach()
        return torch.where(keep, theta, 0.0) if self._places is None else self._places.matrix(theta)
