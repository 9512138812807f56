"""The cubic rise of sparsity (Zhu and Gupta, arXiv 1710.01878): fast at first, slow at the end."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmprune.recovery.phases import Phase, Schedule


class Cubic(Schedule):
    """s = s_f + (s_i - s_f) (1 - p)^3, p the progress of the part in which masks move."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Schedule.Config):
        """Options of the cubic rise.

        Attributes:
            initial: s_i, the sparsity at the first move; that of the matrix where it is lower.
        """

        moves: int = 40
        initial: float = 0.0

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 <= self.initial < 1:
                raise ValueError(f"initial must be in [0, 1), got {self.initial}")
            if self.moves < 1:
                raise ValueError(f"moves must be at least 1, got {self.moves}")

    def shape(self, phase: Phase, steps: int) -> Phase:
        reach = 1 - (1 - self.moving(phase.step, steps)) ** 3
        return replace(phase, reach=reach, initial=self.config.initial)
