"""Dense weights: pruned ones are trained too, and come back with what they have become."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmprune.recovery.parts import Matrix
from llmprune.recovery.trainables.kept import Kept


class Dense(Kept):
    """As `kept`, but starts with every weight: in place of pruned ones with those of the dense model."""

    revives, shrinks = True, False

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of dense weights.

        Attributes:
            grown: as for `kept`; only where nothing remains of pruned weights (rho 0).
            pruned: where weights start that the first mask prunes: at those of the dense model where it is
                known (`dense`), else at those of the start; or at `zero`.
        """

        grown: str = "zero"
        pruned: str = "dense"

        def __post_init__(self) -> None:
            if self.grown not in ("zero", "dense"):
                raise ValueError(f"grown must be zero or dense, got {self.grown!r}")
            if self.pruned not in ("zero", "dense"):
                raise ValueError(f"pruned must be zero or dense, got {self.pruned!r}")

    def start(self, matrix: Matrix, generator: torch.Generator) -> None:
        super().start(matrix, generator)
        theta = matrix.weight.detach().to(torch.float32, copy=True)
        if self.config.pruned == "dense" and matrix.origin is not None:
            theta = torch.where(matrix.keep, theta, matrix.origin().to(theta))
        elif self.config.pruned == "zero":
            theta.masked_fill_(~matrix.keep, 0.0)
        self.tensors = {"theta": theta.requires_grad_()}
