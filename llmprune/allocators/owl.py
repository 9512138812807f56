"""OWL (Yin et al., arXiv 2310.05175): blocks with more outlying weights stay denser."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.contracts import Allocator, Job, Need


class OWL(Allocator):
    """A block's measure is the share of its Wanda scores that exceed `outlier` times their mean.

    The measures are scaled to the range `[0, 2 * limit]` over the blocks, and shifted so that their mean is
    the model's density.
    """

    needs = Need.SECOND_MOMENT

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of OWL.

        Attributes:
            outlier: a score above this multiple of the block's mean score is an outlier.
            limit: how far a block's sparsity may be from the model's. Of several limits, the one whose trial
                has the lowest held-out loss is used.
            trial: the pruner of the trials, by default the recipe's own.
        """

        outlier: float = 5.0
        limit: tuple[float, ...] = (0.08,)
        trial: str = ""

        def __post_init__(self) -> None:
            if not self.outlier > 0:
                raise ValueError(f"outlier must be above 0, got {self.outlier}")
            if not self.limit or not all(0 <= limit < 0.5 for limit in self.limit):
                raise ValueError(f"limit must be in [0, 0.5), got {list(self.limit)}")
            if self.trial and len(self.limit) < 2:
                raise ValueError(
                    "trial is the pruner that compares several limits, and there is one; leave it out"
                )

    @property
    def trials(self) -> tuple[str, ...]:  # type: ignore[override]
        limits = self.config.limit
        return tuple(f"limit {limit:g}" for limit in limits) if len(limits) > 1 else ()

    @property
    def trial_pruner(self) -> str:  # type: ignore[override]
        return str(self.config.trial)

    def measure(self, jobs: Iterable[Job]) -> float:
        total, count, outlying = 0.0, 0, 0
        for job in jobs:
            total, count = total + float(_score(job).sum(dtype=torch.float64)), count + job.weight.numel()
        for job in jobs:
            outlying += int((_score(job) > self.config.outlier * total / count).sum())
        return outlying / count

    def allocate(
        self,
        shapes: Mapping[str, tuple[int, int]],
        blocks: Mapping[str, int],
        measures: Mapping[int, float],
        sparsity: float,
        trial: int = 0,
    ) -> dict[str, float]:
        low, high = min(measures.values()), max(measures.values())
        spread = 2 * self.config.limit[trial] / (high - low) if high > low else 0.0
        scaled = {block: (value - low) * spread for block, value in measures.items()}
        mean = sum(scaled.values()) / len(scaled)
        return {name: sparsity - (scaled[blocks[name]] - mean) for name in shapes}


def _score(job: Job) -> Tensor:
    """Wanda's score of every weight, [R, C]."""
    return job.weight.abs() * job.stats.second_moment.sqrt()
