"""Kept weights that are rounded in every forward pass, and the scales of their grid, which are trained
too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.numerics.grids import Straight, spread
from llmprune.recovery.parts import Matrix
from llmprune.recovery.phases import Phase
from llmprune.recovery.trainables.kept import Kept


class Rounded(Kept):
    """V = code * scale, the code nearest to theta / scale; gradients pass as if nothing were rounded.

    Of the scales their logarithms are trained, so that they stay positive. `scales` [R, ceil(C / 128)] and
    `bits` are set before the start.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Kept.Config):
        """Options of rounded weights.

        Attributes:
            scale_rate: the learning rate of the scales, relative to each and to that of the weights.
        """

        scale_rate: float = 0.1

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 <= self.scale_rate <= 1:
                raise ValueError(f"scale_rate must be in [0, 1], got {self.scale_rate}")

    shrinks = False  # its grid is that of whole rows

    def start(self, matrix: Matrix, generator: torch.Generator) -> None:
        super().start(matrix, generator)
        assert matrix.scales is not None
        self._bits = matrix.bits
        growth = torch.zeros_like(matrix.scales, dtype=torch.float32)
        self.fixed = {"scales": matrix.scales}
        self.tensors["growth"] = growth.requires_grad_()

    def rate_of(self, part: str, size: float) -> float:
        return float(self.config.scale_rate) if part == "growth" else size

    def scales(self) -> Tensor:
        """The scales as they are now, float32; they are stored in bfloat16."""
        scale = self.fixed["scales"].float() * self.tensors["growth"].exp()
        return scale + (scale.bfloat16().float() - scale).detach()

    def weight(self, keep: Tensor, phase: Phase) -> Tensor:
        theta = self.tensors["theta"]
        weight: Tensor = Straight.apply(theta, spread(self.scales(), theta.shape), self._bits)
        return weight

    @torch.no_grad()
    def merge(self, keep: Tensor) -> Tensor:
        return self.weight(keep, Phase(step=0))
