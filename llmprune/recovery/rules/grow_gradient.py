"""Growth by gradient (RigL, Evci et al., arXiv 1911.11134): weights grow where the loss would fall most."""

from __future__ import annotations

from torch import Tensor

from llmprune.recovery.exchange import Exchange
from llmprune.recovery.parts import View


class GrowGradient(Exchange):
    """|G|; the optimizer does not move at a step whose gradient decides."""

    wants = frozenset({"gradient"})
    pauses = True

    def growth(self, view: View) -> Tensor:
        assert view.gradient is not None
        return view.gradient.abs()
