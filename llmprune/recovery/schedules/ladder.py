"""Sparsity in steps of equal length, as in SdGF (arXiv 2402.04744) and Sparse-Llama (arXiv 2405.03594)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmprune.recovery.phases import Phase, Schedule


class Ladder(Schedule):
    """One frame per rung, then the final sparsity in the frozen part. Within a frame masks are chosen anew
    at its sparsity.

    For N:M a rung keeps as many of a group as its sparsity asks for, rounded up: 0.25, 0.5 of 1:8 are 6:8,
    4:8.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Schedule.Config):
        """Options of the ladder.

        Attributes:
            rungs: the sparsities before the final one, ascending; those above that of a matrix count as it.
        """

        moves: int = 1_000_000
        rungs: tuple[float, ...] = (0.25, 0.5)

        def __post_init__(self) -> None:
            super().__post_init__()
            ascending = list(self.rungs) == sorted(set(self.rungs))
            if not self.rungs or not ascending or not all(0 <= rung < 1 for rung in self.rungs):
                raise ValueError(f"rungs must be ascending sparsities in [0, 1), got {self.rungs}")

    def shape(self, phase: Phase, steps: int) -> Phase:
        rungs, moving = self.config.rungs, self.moving(phase.step, steps)
        if moving >= 1:
            return phase
        return replace(phase, reach=0.0, initial=rungs[int(moving * len(rungs))])
