"""Wanda (Sun et al., arXiv 2306.11695): weight times the norm of the input it meets."""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.contracts import InputStats, Need, ScorePruner


class Wanda(ScorePruner):
    """Score `|W_ij| * sqrt(mean x_j^2)`, compared per row."""

    needs = Need.SECOND_MOMENT

    def score(self, weight: Tensor, stats: InputStats, generator: torch.Generator) -> Tensor:
        return weight.abs() * stats.second_moment.sqrt()
