"""ATP (Huang et al., arXiv 2502.14770): sparsity rises from block to block by the same step; trials on
calibration rows find the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmprune.contracts import Allocator


class ATP(Allocator):
    """Block b of B gets sparsity `S + slope * (b - (B + 1) / 2)`, where S is the model's sparsity.

    Of several slopes, the one whose trial has the lowest held-out loss is used.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of ATP.

        Attributes:
            slopes: to try, as shares of the steepest possible one, `2 min(S, 1 - S) / (B - 1)`; sparsity
                falls with a negative one.
            trial: the pruner of the trials, by default the recipe's
                own. Refiner and updates do not run in trials.
        """

        slopes: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.45, 0.6)
        trial: str = ""

        def __post_init__(self) -> None:
            if not self.slopes or not all(-1 <= slope <= 1 for slope in self.slopes):
                raise ValueError(f"slopes must be shares in [-1, 1], got {list(self.slopes)}")
            if self.trial and len(self.slopes) < 2:
                raise ValueError(
                    "trial is the pruner that compares several slopes, and there is one; leave it out"
                )

    @property
    def trials(self) -> tuple[str, ...]:  # type: ignore[override]
        slopes = self.config.slopes
        return tuple(f"slope {slope:g}" for slope in slopes) if len(slopes) > 1 else ()

    @property
    def trial_pruner(self) -> str:  # type: ignore[override]
        return str(self.config.trial)

    def allocate(
        self,
        shapes: Mapping[str, tuple[int, int]],
        blocks: Mapping[str, int],
        measures: Mapping[int, float],
        sparsity: float,
        trial: int = 0,
    ) -> dict[str, float]:
        numbers = sorted({blocks[name] for name in shapes})
        rise = self.config.slopes[trial] * min(sparsity, 1 - sparsity)  # from the middle block to the last
        last = len(numbers) - 1
        # From -1 at the first block to 1 at the last.
        position = {number: 2 * i / last - 1 if last else 0.0 for i, number in enumerate(numbers)}
        return {name: sparsity + rise * position[blocks[name]] for name in shapes}
