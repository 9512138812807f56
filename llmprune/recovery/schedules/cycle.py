"""Parts of the model are dense by turns (scheduled Grow-and-Prune, Ma et al., arXiv 2106.09857)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmprune.recovery.phases import Phase, Schedule


class Cycle(Schedule):
    """One part after the other is dense for a while and is then pruned again; at the end all are sparse."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Schedule.Config):
        """Options of the cycle.

        Attributes:
            parts: of the model, in the order of its blocks.
            rounds: how often each part is dense.
        """

        moves: int = 1
        parts: int = 3
        rounds: int = 1

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.moves != 1:
                raise ValueError(
                    f"moves must be 1, since parts and rounds decide when masks move, got {self.moves}"
                )
            for name in ("parts", "rounds"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def _turn(self, step: int, steps: int) -> int:
        """The number of turns that have ended."""
        span, turns = self.span(steps), self.config.parts * self.config.rounds
        if step < span.start:
            return -1
        if step >= span[-1]:
            return int(turns)
        return int((step - span.start) * turns // (len(span) - 1))

    def moves_at(self, step: int, steps: int) -> bool:
        return self._turn(step, steps) != (self._turn(step - 1, steps) if step else -1)

    def shape(self, phase: Phase, steps: int) -> Phase:
        turn, parts = self._turn(phase.step, steps), self.config.parts
        busy = 0 <= turn < parts * self.config.rounds
        return replace(phase, dense=frozenset({turn % parts} if busy else ()), parts=parts)
