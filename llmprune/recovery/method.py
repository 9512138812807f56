"""A method of training with sparsity, put together of its parts, and its learning rate over the steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llmprune.recovery.optimizer import OptimizerSpec
from llmprune.recovery.parts import MaskRule
from llmprune.recovery.phases import Numbers, Schedule
from llmprune.recovery.task import Term

DECAYS = ("cosine", "linear", "constant")


@dataclass(frozen=True, kw_only=True)
class RateSpec:
    """The learning rate over the steps.

    Attributes:
        rate: the highest one.
        warm_up: steps over which it rises from zero; below 1 a share of all steps.
        decay: how it falls afterwards, counted from the first step: `cosine`, `linear` or `constant`.
        floor: where it ends, as a share of the highest.
        relative: whether it is relative to the root mean square of a matrix's kept weights, since the steps
            of AdamW do not follow the size of a weight.
    """

    rate: float = 3e-4
    warm_up: float = 0.05
    decay: str = "cosine"
    floor: float = 0.0
    relative: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 10:
            raise ValueError(f"rate must be above 0 and at most 10, got {self.rate}")
        if self.warm_up < 0:
            raise ValueError(f"warm_up must be at least 0, got {self.warm_up}")
        if self.decay not in DECAYS:
            raise ValueError(f"decay must be one of {', '.join(DECAYS)}, got {self.decay!r}")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor must be in [0, 1], got {self.floor}")

    def at(self, step: int, steps: int) -> float:
        """The learning rate of a step."""
        warm = self.warm_up if self.warm_up >= 1 else self.warm_up * steps
        rise = min(1.0, (step + 1) / warm) if warm else 1.0
        progress = step / steps
        falls = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
        return self.rate * rise * (self.floor + (1 - self.floor) * falls[self.decay])


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of training with sparsity, put together.

    Attributes:
        schedule, rule, numbers, terms: see `parts`; `rule` may be None where masks never move.
        trainable: makes what is trained of a matrix.
        rate, optimizer: how tensors move.
        steps: of the optimizer. batch: sequences per step.
        clip: the largest norm of all gradients together; 0 for any.
        seed: of everything random.
    """

    schedule: Schedule
    rule: MaskRule | None
    numbers: Numbers
    terms: tuple[Term, ...]
    trainable: Any
    rate: RateSpec
    optimizer: OptimizerSpec
    steps: int
    batch: int
    clip: float = 0.0
    seed: int = 0

    @property
    def still(self) -> bool:
        """Whether no mask moves, and nothing but kept weights counts."""
        return not self.schedule.config.moves and self.numbers == Numbers()
