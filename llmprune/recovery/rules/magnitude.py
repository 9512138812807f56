"""Magnitude: the largest weights are kept (GMP, arXiv 1710.01878; SR-STE, arXiv 2102.04010; AC/DC, arXiv
2106.12379).
"""

from __future__ import annotations

from torch import Tensor

from llmprune.recovery.parts import MaskRule, View


class Magnitude(MaskRule):
    """The absolute value of what the trainable compares."""

    def score(self, view: View) -> Tensor:
        return view.weight.abs()
