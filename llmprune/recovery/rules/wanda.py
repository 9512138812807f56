"""Wanda (arXiv 2306.11695): weights are kept by size times the norm of their input, as in AST (arXiv
2407.20584).
"""

from __future__ import annotations

from torch import Tensor

from llmprune.recovery.parts import MaskRule, View


class Wanda(MaskRule):
    """|theta| times the root mean square of each input, measured anew at every move."""

    wants = frozenset({"inputs"})

    def score(self, view: View) -> Tensor:
        assert view.inputs is not None
        return view.weight.abs() * view.inputs.to(view.weight).sqrt()
