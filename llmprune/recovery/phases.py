"""What holds at a step of training with sparsity: the four numbers, the phase, and the schedules."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from llmprune.contracts import Algorithm

FIXED = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """The four numbers of the step above, and how two of them change with the progress of training.

    Attributes:
        beta: what pruned weights count in the forward pass.
        gamma: what share of the gradient reaches them.
        lam: lambda, the decay that pulls them to zero.
        rho: what remains of them after a step.
        beta_fall: how beta falls to zero: `none`, `linear` or `exponential`, over the part of the training
            in which masks move.
        ramp: the share of the training over which lambda rises from zero.
    """

    beta: float = 0.0
    gamma: float = 0.0
    lam: float = 0.0
    rho: float = 0.0
    beta_fall: str = "none"
    ramp: float = 0.0

    def __post_init__(self) -> None:
        for name in ("beta", "gamma", "rho", "ramp"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"numbers.{name} must be in [0, 1], got {getattr(self, name)}")
        if self.lam < 0:
            raise ValueError(f"numbers.lam must be at least 0, got {self.lam}")
        if self.beta_fall not in ("none", "linear", "exponential"):
            raise ValueError(f"numbers.beta_fall must be none, linear or exponential, got {self.beta_fall!r}")

    def at(self, progress: float, moving: float) -> tuple[float, float, float, float]:
        """The numbers at a progress in [0, 1), `moving` being that of the part in which masks move."""
        falls = {"none": 1.0, "linear": max(0.0, 1 - moving), "exponential": math.exp(-5 * moving)}
        ramp = min(1.0, progress / self.ramp) if self.ramp else 1.0
        return self.beta * falls[self.beta_fall], self.gamma, self.lam * ramp, self.rho


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What holds at one step.

    Attributes:
        step: its number, from 0.
        move: whether masks are chosen anew before it.
        reach: how far the sparsity is on its way from `initial` to that of the matrix, in [0, 1].
        initial: the sparsity at reach 0.
        share: of the kept weights, how many a growing rule exchanges.
        dense: the parts of the model that are dense meanwhile; `parts` is how many parts there are.
        frozen: masks do not move any more, and pruned weights are gone.
        numbers: beta, gamma, lambda and rho.
        progress: of the training, in [0, 1).
    """

    step: int
    move: bool = False
    reach: float = 1.0
    initial: float = 0.0
    share: float = 0.0
    dense: frozenset[int] = frozenset()
    parts: int = 1
    frozen: bool = False
    numbers: tuple[float, float, float, float] = FIXED
    progress: float = 0.0


class Schedule(Algorithm, ABC):
    """Says what holds at each step: a pure function of the progress.

    Every schedule has the options of its base class; `at` fills in what they decide.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of every schedule.

        Attributes:
            moves: how often masks are chosen anew, at most every step; 0 for never.
            start: the share of the steps before the first move.
            freeze: the share of the steps at the end in which masks are fixed.
        """

        moves: int = 0
        start: float = 0.0
        freeze: float = 0.2

        def __post_init__(self) -> None:
            if self.moves < 0:
                raise ValueError(f"moves must be at least 0, got {self.moves}")
            if not (0 <= self.start < 1 and 0 <= self.freeze < 1 and self.start + self.freeze < 1):
                raise ValueError(
                    f"start and freeze must be shares with a sum below 1, got {self.start} and {self.freeze}"
                )

    @property
    def apart(self) -> int:
        """Steps from one move to the next at the least; where `moves` do not fit, there are fewer."""
        return 1

    def span(self, steps: int) -> range:
        """The steps before which masks may be chosen anew."""
        first = round(self.config.start * steps)
        return range(first, max(first + 1, steps - round(self.config.freeze * steps) + 1))

    def moving(self, step: int, steps: int) -> float:
        """The progress within the part in which masks move, in [0, 1]."""
        span = self.span(steps)
        if step >= span[-1]:
            return 1.0
        return max(0.0, (step - span.start) / max(1, len(span) - 1))

    def moves_at(self, step: int, steps: int) -> bool:
        """Whether masks are chosen anew before a step: `moves` times, evenly spread, the last at the end."""
        span = self.span(steps)
        at, length = step - span.start, len(span) - 1
        moves = min(self.config.moves, length // self.apart + 1)
        if not moves or step not in span:
            return False
        if moves == 1:
            return at == length
        return any(round(number * length / (moves - 1)) == at for number in _near(at, length, moves))

    def at(self, step: int, steps: int, numbers: Numbers) -> Phase:
        """What holds at a step of so many."""
        frozen = bool(self.config.moves) and step >= self.span(steps)[-1]
        fixed = frozen or not self.config.moves
        progress = step / steps
        found = FIXED if fixed else numbers.at(progress, self.moving(step, steps))
        phase = Phase(
            step=step,
            move=self.moves_at(step, steps),
            frozen=fixed,
            numbers=found,
            progress=progress,
        )
        return self.shape(phase, steps)

    @abstractmethod
    def shape(self, phase: Phase, steps: int) -> Phase:
        """The phase with what this schedule decides."""


def _near(at: int, length: int, moves: int) -> range:
    """The numbers of the moves that may fall on a step."""
    middle = at * (moves - 1) / length
    return range(max(0, math.floor(middle) - 1), min(moves, math.ceil(middle) + 2))
