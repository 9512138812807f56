"""Random pruning: the floor every method must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.contracts import InputStats, ScorePruner


class Random(ScorePruner):
    """Uniform noise as the score.

    The seed depends on the matrix's name, so order and device do not matter.
    """

    def score(self, weight: Tensor, stats: InputStats, generator: torch.Generator) -> Tensor:
        return torch.rand(weight.shape, generator=generator, dtype=torch.float32).to(weight.device)
