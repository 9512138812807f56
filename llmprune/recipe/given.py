"""Stands in the place of a pruner where a run starts from masks that it is given."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmprune import registry
from llmprune.contracts import Job, Need, Pruned, Pruner, ScorePruner

NAME = "masks"  # in recipes and records, where a pruner's name stands


class GivenMasks(Pruner):
    """Prunes by given keep masks; the kept weights stay unchanged.

    The score is Wanda's: refiners that swap weights of a group compare by it.

    Args:
        keep: the keep mask of a matrix, by the matrix's name; None in a plan, where nothing is pruned.
    """

    needs = Need.SECOND_MOMENT

    def __init__(self, keep: Callable[[str], Tensor] | None = None) -> None:
        super().__init__()
        self._keep = keep
        self._scorer: ScorePruner = registry.build("pruners", "wanda", {})

    def prune(self, job: Job) -> Pruned:
        assert self._keep is not None
        keep, weight = self._keep(job.name).to(job.weight.device), job.weight
        reached = job.stats.count > 0
        score = self._scorer.score(weight, job.stats, job.generator) if reached else weight.abs()
        return Pruned(torch.where(keep, weight, 0.0), keep, score)
