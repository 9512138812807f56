"""ERK (Mocanu et al., arXiv 1707.04780; Evci et al.,
arXiv 1911.11134): small and uneven matrices stay denser.
"""

from __future__ import annotations

from collections.abc import Mapping

from llmprune.contracts import Allocator


class ERK(Allocator):
    """Density proportional to `(R + C) / (R * C)`, at most 1, scaled so that the model's sparsity is met."""

    def allocate(
        self,
        shapes: Mapping[str, tuple[int, int]],
        blocks: Mapping[str, int],
        measures: Mapping[int, float],
        sparsity: float,
        trial: int = 0,
    ) -> dict[str, float]:
        kept = (1 - sparsity) * sum(r * c for r, c in shapes.values())
        full: set[str] = set()
        # A matrix whose density would be above 1 stays dense, and the others share what is left.
        while True:
            free = [n for n in shapes if n not in full]
            left = kept - sum(shapes[n][0] * shapes[n][1] for n in full)
            scale = left / max(1, sum(sum(shapes[n]) for n in free))
            over = {n for n in free if scale * sum(shapes[n]) > shapes[n][0] * shapes[n][1]}
            if not over:
                break
            full |= over
        return {n: 0.0 if n in full else 1 - scale * (r + c) / (r * c) for n, (r, c) in shapes.items()}
