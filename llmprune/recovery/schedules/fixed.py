"""The final sparsity from the start: masks stay, or are chosen anew at the same sparsity."""

from __future__ import annotations

from llmprune.recovery.phases import Phase, Schedule


class Fixed(Schedule):
    """Nothing changes but the masks, where `moves` is above 0."""

    def shape(self, phase: Phase, steps: int) -> Phase:
        return phase
