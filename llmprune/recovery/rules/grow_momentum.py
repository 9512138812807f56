"""Growth by momentum (sparse momentum, Dettmers and Zettlemoyer, arXiv 1907.04840, with Adam's moments)."""

from __future__ import annotations

from torch import Tensor

from llmprune.recovery.exchange import Exchange
from llmprune.recovery.parts import View


class GrowMomentum(Exchange):
    """|m| / (sqrt(v) + 1e-8), with the moments of the gradients that reach pruned weights too."""

    wants = frozenset({"moments"})

    def growth(self, view: View) -> Tensor:
        assert view.mean is not None and view.square is not None
        return view.mean.abs() / (view.square.sqrt() + 1e-8)
