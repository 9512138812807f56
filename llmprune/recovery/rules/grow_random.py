"""Random growth (SET, arXiv 1707.04780): weights that grow are drawn uniformly among the pruned ones."""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.recovery.exchange import Exchange
from llmprune.recovery.parts import View


class GrowRandom(Exchange):
    """A uniform random number for every weight, seeded by matrix and step."""

    def growth(self, view: View) -> Tensor:
        drawn = torch.rand(view.keep.shape, generator=view.generator, dtype=torch.float32)
        return drawn.to(view.keep.device)
