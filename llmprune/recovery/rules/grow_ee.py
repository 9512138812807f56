"""Exploration and exploitation (DST-EE, Huang et al., arXiv 2211.16667): by gradient, and by how rarely a
weight was
kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from llmprune.recovery.exchange import Exchange
from llmprune.recovery.parts import View


class GrowEe(Exchange):
    """|G| + c ln(t) / (N + eps), N the number of moves at which a weight was kept.

    |G| is divided by its mean, so that c has the same meaning for every matrix.
    """

    wants = frozenset({"gradient", "active"})
    pauses = True

    @dataclass(frozen=True, kw_only=True)
    class Config(Exchange.Config):
        """Options of DST-EE.

        Attributes:
            explore: c.
            eps: added to N.
            relative: divide |G| by its mean.
        """

        explore: float = 0.1
        eps: float = 1.0
        relative: bool = True

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.explore < 0:
                raise ValueError(f"explore must be at least 0, got {self.explore}")
            if not self.eps > 0:
                raise ValueError(f"eps must be above 0, got {self.eps}")

    def growth(self, view: View) -> Tensor:
        assert view.gradient is not None and view.active is not None
        gradient = view.gradient.abs()
        if self.config.relative:
            gradient = gradient / gradient.mean().clamp(min=1e-30)
        explore = self.config.explore * math.log(max(1, view.phase.step))
        growth: Tensor = gradient + explore / (view.active.to(gradient) + self.config.eps)
        return growth
