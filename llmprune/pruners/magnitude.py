"""Magnitude pruning (Han et al., arXiv 1506.02626): small weights go."""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.contracts import InputStats, ScorePruner


class Magnitude(ScorePruner):
    """Score `|W_ij|`, compared over the whole matrix unless the recipe says `scope: row`."""

    scope = "matrix"

    def score(self, weight: Tensor, stats: InputStats, generator: torch.Generator) -> Tensor:
        return weight.abs()
