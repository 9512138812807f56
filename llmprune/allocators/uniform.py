"""Uniform allocation: every matrix gets the model's sparsity."""

from __future__ import annotations

from collections.abc import Mapping

from llmprune.contracts import Allocator


class Uniform(Allocator):
    """The same sparsity for every matrix."""

    def allocate(
        self,
        shapes: Mapping[str, tuple[int, int]],
        blocks: Mapping[str, int],
        measures: Mapping[int, float],
        sparsity: float,
        trial: int = 0,
    ) -> dict[str, float]:
        return dict.fromkeys(shapes, sparsity)
