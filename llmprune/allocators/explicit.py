"""Explicit allocation: sparsities by matrix name from the recipe; the other matrices share what remains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from llmprune.contracts import Allocator


class Explicit(Allocator):
    """Sparsity by glob pattern on matrix names; the first pattern that matches counts.

    The other matrices all get the sparsity with which the whole model reaches its own.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`sparsity`: glob pattern -> sparsity in [0, 1)."""

        sparsity: Mapping[str, float] = field(default_factory=dict)

        def __post_init__(self) -> None:
            for pattern, value in self.sparsity.items():
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
                    raise ValueError(f"sparsity of {pattern!r} must be a number in [0, 1), got {value!r}")

    def allocate(
        self,
        shapes: Mapping[str, tuple[int, int]],
        blocks: Mapping[str, int],
        measures: Mapping[int, float],
        sparsity: float,
        trial: int = 0,
    ) -> dict[str, float]:
        wished = {name: self._wished(name) for name in shapes}
        for pattern in self.config.sparsity:
            if not any(fnmatchcase(name, pattern) for name in shapes):
                raise ValueError(
                    f"pattern {pattern!r} of allocator 'explicit' matches no matrix, "
                    f"such as {next(iter(shapes))!r}"
                )
        sizes = {n: r * c for n, (r, c) in shapes.items()}
        rest = sum(sizes[n] for n, s in wished.items() if s is None)
        left = sparsity * sum(sizes.values()) - sum(sizes[n] * s for n, s in wished.items() if s is not None)
        share = left / rest if rest else (0.0 if abs(left) < 1 else -1.0)
        if not 0 <= share < 1:
            raise ValueError(
                f"the sparsities of allocator 'explicit' leave {left / max(1, rest):.3f} for the other "
                f"matrices to reach {sparsity:g} overall, which must be in [0, 1); "
                "change them or the model's sparsity"
            )
        return {n: share if s is None else float(s) for n, s in wished.items()}

    def _wished(self, name: str) -> float | None:
        """The sparsity given for a matrix; None where no pattern matches its name."""
        given = self.config.sparsity.items()
        return next((sparsity for pattern, sparsity in given if fnmatchcase(name, pattern)), None)
