"""Random pruning: the floor every method must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.contracts import InputStats, ScorePruner


class Random(ScorePruner):
    """Uniform noise, seeded per matrix name, so a run is the same in any order and on any device."""

    def score(self, weight: Tensor, stats: InputStats, generator: torch.Generator) -> Tensor:
        return torch.rand(weight.shape, generator=generator, dtype=torch.float32).to(weight.device)
