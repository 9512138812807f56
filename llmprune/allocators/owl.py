"""OWL (Yin et al., arXiv 2310.05175): blocks with more outlying weights stay denser."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.contracts import Allocator, Job, Need


class OWL(Allocator):
    """The share of a block's Wanda scores above `outlier` times the block's mean score, scaled over the blocks to `[0, 2 * limit]`."""

    needs = Need.SECOND_MOMENT

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`outlier`: how many times the mean makes an outlier. `limit`: how far a block may be from the model's sparsity."""

        outlier: float = 5.0
        limit: float = 0.08

        def __post_init__(self) -> None:
            for name in ("outlier", "limit"):
                if not getattr(self, name) > 0:
                    raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")

    def measure(self, jobs: Iterable[Job]) -> float:
        total, count, outlying = 0.0, 0, 0
        for job in jobs:
            total, count = total + float(_score(job).sum(dtype=torch.float64)), count + job.weight.numel()
        for job in jobs:
            outlying += int((_score(job) > self.config.outlier * total / count).sum())
        return outlying / count

    def allocate(
        self, shapes: Mapping[str, tuple[int, int]], blocks: Mapping[str, int], measures: Mapping[int, float], sparsity: float
    ) -> dict[str, float]:
        low, high = min(measures.values()), max(measures.values())
        spread = 2 * self.config.limit / (high - low) if high > low else 0.0
        scaled = {block: (value - low) * spread for block, value in measures.items()}
        mean = sum(scaled.values()) / len(scaled)
        return {name: sparsity - (scaled[blocks[name]] - mean) for name in shapes}


def _score(job: Job) -> Tensor:
    return job.weight.abs() * job.stats.second_moment.sqrt()
