"""DLP (Chen et al., arXiv 2505.23807): blocks with a
larger share of the model's Wanda scores are pruned more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llmprune.contracts import Allocator, Job, Need


class DLP(Allocator):
    """A block's score is the mean of `|W_ij| * ||x_j||` over its weights.

    Its keep ratio is `1 - score / sum of all scores`. The ratios are scaled to the range `[0, 2 * limit]`
    over the blocks, and shifted so that their mean is the model's density.
    """

    needs = Need.SECOND_MOMENT

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`limit`: how far a block may be from the model's sparsity."""

        limit: float = 0.15

        def __post_init__(self) -> None:
            if not self.limit > 0:
                raise ValueError(f"limit must be above 0, got {self.limit}")

    def measure(self, jobs: Iterable[Job]) -> float:
        total, count = 0.0, 0
        for job in jobs:
            # ||x_j|| is sqrt(tokens) times this norm; the factor
            # is the same for all blocks and cancels in the ratios.
            total += float((job.weight.abs() @ job.stats.second_moment.sqrt()).double().sum())
            count += job.weight.numel()
        return total / count

    def allocate(
        self,
        shapes: Mapping[str, tuple[int, int]],
        blocks: Mapping[str, int],
        measures: Mapping[int, float],
        sparsity: float,
        trial: int = 0,
    ) -> dict[str, float]:
        total = sum(measures.values())
        ratios = {block: 1 - value / total if total > 0 else 0.0 for block, value in measures.items()}
        low, high = min(ratios.values()), max(ratios.values())
        spread = 2 * self.config.limit / (high - low) if high > low else 0.0
        scaled = {block: (ratio - low) * spread for block, ratio in ratios.items()}
        mean = sum(scaled.values()) / len(scaled)
        return {name: sparsity - (scaled[blocks[name]] - mean) for name in shapes}
