"""Alternating compressed and dense phases (AC/DC, Peste et al., arXiv 2106.12379)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmprune.recovery.phases import Phase, Schedule


class Alternate(Schedule):
    """Compressed and dense phases of equal length by turns, the first one compressed; the end is
    compressed.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Schedule.Config):
        """Options of alternating phases.

        Attributes:
            rounds: pairs of a compressed and a dense phase.
        """

        moves: int = 1
        rounds: int = 4

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.moves != 1:
                raise ValueError(f"moves must be 1, since rounds decides when masks move, got {self.moves}")
            if self.rounds < 1:
                raise ValueError(f"rounds must be at least 1, got {self.rounds}")

    def _phase(self, step: int, steps: int) -> int:
        """The number of the phase at a step: even ones are compressed."""
        span = self.span(steps)
        if step < span.start:
            return 0
        phases = 2 * int(self.config.rounds)
        if step >= span[-1]:
            return phases
        return (step - span.start) * phases // (len(span) - 1)

    def moves_at(self, step: int, steps: int) -> bool:
        changes = self._phase(step, steps) != self._phase(step - 1, steps)
        return changes or step == self.span(steps).start

    def shape(self, phase: Phase, steps: int) -> Phase:
        odd = self._phase(phase.step, steps) % 2
        return replace(phase, dense=frozenset({0} if odd else ()))
