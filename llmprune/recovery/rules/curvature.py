"""Magnitude weighted by curvature (ELSA, arXiv 2510.01650): what a weight costs by the second moment of
Adam.

Where pruned weights are pulled to zero through Adam (trainable `split`), their moments are those of the pull,
and this rule keeps what is pulled most: with a strong pull take `magnitude`.
"""

from __future__ import annotations

from torch import Tensor

from llmprune.recovery.parts import MaskRule, View


class Curvature(MaskRule):
    """v theta^2, with v the second moment of Adam, corrected for its start; theta^2 before the first step."""

    wants = frozenset({"moments"})

    def score(self, view: View) -> Tensor:
        size = view.weight.square()
        return size if view.square is None else view.square * size
