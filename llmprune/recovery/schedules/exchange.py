"""Exchange at a fixed sparsity, of a share of the kept weights that falls by a cosine (RigL, arXiv
1911.11134).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from llmprune.recovery.phases import Phase, Schedule


class Exchange(Schedule):
    """At every move a growing rule exchanges `share` of the kept weights.

    What grows needs some steps before it is compared, and a rule that looks at gradients spends a step on
    each move; so in a short training, or a trial of rates, there are fewer moves than asked for.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Schedule.Config):
        """Options of the exchange.

        Attributes:
            share: of the kept weights, at the first move.
            decay: `cosine` to 0, or `constant`.
            apart: steps from one move to the next at the least.
        """

        moves: int = 30
        freeze: float = 0.22
        share: float = 0.3
        decay: str = "cosine"
        apart: int = 4

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 < self.share <= 1:
                raise ValueError(f"share must be in (0, 1], got {self.share}")
            if self.decay not in ("cosine", "constant"):
                raise ValueError(f"decay must be cosine or constant, got {self.decay!r}")
            if self.apart < 1:
                raise ValueError(f"apart must be at least 1, got {self.apart}")

    @property
    def apart(self) -> int:
        return int(self.config.apart)

    def moves_at(self, step: int, steps: int) -> bool:
        return step > 0 and super().moves_at(step, steps)  # before the first step nothing is known to grow by

    def shape(self, phase: Phase, steps: int) -> Phase:
        share = self.config.share
        if self.config.decay == "cosine":
            share *= 0.5 * (1 + math.cos(math.pi * self.moving(phase.step, steps)))
        return replace(phase, share=share)
