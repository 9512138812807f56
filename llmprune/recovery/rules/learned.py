"""Learned masks: the trainable has learned a score (Lottery Jackpots, MaskLLM, PST)."""

from __future__ import annotations

from torch import Tensor

from llmprune.recovery.parts import MaskRule, View


class Learned(MaskRule):
    """The score that the trainable has learned."""

    def score(self, view: View) -> Tensor:
        if view.learned is None:
            raise ValueError("rule learned is for trainables that learn a score; take another rule")
        return view.learned
