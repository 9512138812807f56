"""Uniform allocation: every matrix gets the model's sparsity."""

from __future__ import annotations

from collections.abc import Mapping

from llmprune.contracts import Allocator


class Uniform(Allocator):
    """The same sparsity for every matrix."""

    def allocate(self, measures: Mapping[str, float], sizes: Mapping[str, int], sparsity: float) -> dict[str, float]:
        return dict.fromkeys(sizes, sparsity)
