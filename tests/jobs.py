"""Random layers for tests of algorithms: weights, calibration inputs and their statistics, as the corridor
would hand them over.
"""

from __future__ import annotations

import numpy as np
import oracles
import torch

from llmprune import registry
from llmprune.contracts import InputStats, Job, Need, Pattern
from llmprune.patterns import NM, Unstructured
from llmprune.statistics.sums import StatsSums, sample_positions

ALL = Need.MEAN | Need.SECOND_MOMENT | Need.VARIANCE | Need.WITHIN_VARIANCE | Need.GRAM | Need.SAMPLE
PATTERNS = {"row": Unstructured("row"), "matrix": Unstructured("matrix"), "2:4": NM(2, 4)}


def inputs(columns: int, sequences: int = 6, tokens: int = 20, seed: int = 0) -> torch.Tensor:
    """Correlated inputs [N, T, C] with features of very different size and mean, as in real models."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(sequences, tokens, columns, generator=generator) @ mixing + torch.randn(
        columns, generator=generator
    )
    return x * torch.rand(columns, generator=generator).mul(2).exp() + 0.3 * torch.randn(
        sequences, 1, columns, generator=generator
    )


def statistics(x: torch.Tensor, needs: Need = ALL, size: int = 64) -> InputStats:
    """Statistics of inputs [N, T, C], collected in two batches."""
    sums = StatsSums(needs, sample_positions(x.shape[0], x.shape[1], 0, size))
    half = x.shape[0] // 2
    sums.add(x[:half], 0)
    sums.add(x[half:], half)
    return sums.result()


def job(
    pattern: Pattern,
    sparsity: float,
    rows: int = 12,
    columns: int = 32,
    seed: int = 0,
    x: torch.Tensor | None = None,
) -> Job:
    """A layer to prune."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 1))
    stats = statistics(inputs(columns, seed=seed) if x is None else x)
    return Job("layer", weight, stats, pattern, sparsity, torch.Generator().manual_seed(seed))


def array(tensor: torch.Tensor) -> np.ndarray:
    """Float64 for the oracles."""
    return tensor.double().numpy()


def build(room, name, **options):
    """An algorithm by its name."""
    return registry.build(room, name, options)


def layer(pattern, seed=0):
    """A layer to prune with one of PATTERNS, to 60 % where the pattern leaves it open."""
    pattern = PATTERNS[pattern]
    return job(pattern, pattern.sparsity if isinstance(pattern, NM) else 0.6, rows=12, columns=32, seed=seed)


def masked(score, work, pattern):
    """The oracle's keep mask of a score for one of PATTERNS."""
    if pattern == "2:4":
        return oracles.nm_mask(score, 2, 4)
    return oracles.unstructured_mask(score, work.sparsity, pattern)
