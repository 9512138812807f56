"""Unfired growth (in-time over-parameterisation, arXiv 2102.02887): weights that were never kept grow
first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.recovery.exchange import Exchange
from llmprune.recovery.parts import View


class GrowUnfired(Exchange):
    """Random, but every weight that was never kept before any that was."""

    wants = frozenset({"active"})

    def growth(self, view: View) -> Tensor:
        assert view.active is not None
        drawn = torch.rand(view.keep.shape, generator=view.generator, dtype=torch.float32)
        return drawn.to(view.keep.device) + (view.active == 0)
