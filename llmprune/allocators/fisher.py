"""Fisher: what a weight is worth to the loss of the whole model decides how many of its matrix are pruned.

A weight's saliency is w^2 F, with F its entry of the diagonal of the empirical Fisher matrix (Theis et al.,
arXiv 1801.05787, after optimal brain damage, LeCun et al., 1989).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmprune.contracts import Allocator, Job

_POINTS = 32  # a curve has one more: the quantiles at 0, 1/32, .. 1
_SAMPLE = 1 << 18  # weights of a matrix whose saliencies are sorted
_EXPERTS = "*"  # stands for all experts of a block


class Fisher(Allocator):
    """Every matrix loses as many weights as it has among the least salient of the whole model.

    Of each matrix the quantiles of log2(saliency) are kept; the experts of a block share theirs, since some
    see few tokens of the calibration text. A matrix that no token reached gets the model's sparsity. The
    pruner then chooses by its own criterion which weights go.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of Fisher.

        Attributes:
            samples: calibration sequences whose gradients are squared.
            tokens: of each, from its beginning.
            strength: 1 follows the saliencies, 0 gives every matrix the model's sparsity. They say what a
                weight costs by itself, not what all cost together, so half of the way is better.
            most: no matrix loses a larger share of its weights.
        """

        samples: int = 32
        tokens: int = 256
        strength: float = 0.5
        most: float = 0.98

        def __post_init__(self) -> None:
            if self.samples < 1:
                raise ValueError(f"samples must be at least 1, got {self.samples}")
            if self.tokens < 2:
                raise ValueError(f"tokens must be at least 2, got {self.tokens}")
            if not 0 <= self.strength <= 1:
                raise ValueError(f"strength must be in [0, 1], got {self.strength}")
            if not 0 < self.most < 1:
                raise ValueError(f"most must be in (0, 1), got {self.most}")

    @property
    def rows(self) -> int:  # type: ignore[override]
        return int(self.config.samples)

    @property
    def length(self) -> int:  # type: ignore[override]
        return int(self.config.tokens)

    def measure(self, jobs: Iterable[Job]) -> dict[str, list[float]]:
        curves, experts = {}, []
        for job in jobs:
            assert job.gradient is not None
            logs = _sampled(job, _SAMPLE // 16 if job.routed else _SAMPLE)
            if job.routed:
                experts.append(logs)
            else:
                curves[job.name] = _quantiles(logs)
        return curves | ({_EXPERTS: _quantiles(torch.cat(experts))} if experts else {})

    def allocate(
        self,
        shapes: Mapping[str, tuple[int, int]],
        blocks: Mapping[str, int],
        measures: Mapping[int, Any],
        sparsity: float,
        trial: int = 0,
    ) -> dict[str, float]:
        curves = {name: _curve(name, measures.get(blocks[name], {})) for name in shapes}
        sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
        most = max(self.config.most, sparsity)

        def wished(threshold: float) -> dict[str, float]:
            given = {n: _below(curve, threshold) if curve else sparsity for n, curve in curves.items()}
            return {n: min(most, sparsity + self.config.strength * (s - sparsity)) for n, s in given.items()}

        if not any(curves.values()):
            return dict.fromkeys(shapes, sparsity)
        known = [curve for curve in curves.values() if curve]
        low, high = min(curve[0] for curve in known), max(curve[-1] for curve in known) + 1
        total = sparsity * sum(sizes.values())
        for _ in range(60):
            middle = (low + high) / 2
            lost = sum(share * sizes[name] for name, share in wished(middle).items())
            low, high = (middle, high) if lost < total else (low, middle)
        return wished(high)


def _sampled(job: Job, count: int) -> Tensor:
    """log2 of the saliencies of so many weights, drawn with a seed, of all where there are no more."""
    assert job.gradient is not None
    weight, gradient = job.weight.flatten(), job.gradient.flatten()
    if len(weight) > count:
        drawn = torch.randint(len(weight), (count,), generator=job.generator).to(weight.device)
        weight, gradient = weight[drawn], gradient[drawn]
    return (weight.double().square() * gradient).clamp_(min=1e-60).log2_().cpu()


def _quantiles(logs: Tensor) -> list[float]:
    """The quantiles at 0, 1/32, .. 1, to three digits: the last ones of a sum depend on its order."""
    places = torch.linspace(0, len(logs) - 1, _POINTS + 1, dtype=torch.float64).round().long()
    return [round(value, 3) for value in logs.sort().values[places].tolist()]


def _curve(name: str, measure: Mapping[str, Sequence[float]]) -> Sequence[float]:
    """The curve of a matrix, or of its block's experts; empty where nothing is known."""
    return measure.get(name, measure.get(_EXPERTS, ()))


def _below(curve: Sequence[float], threshold: float) -> float:
    """The share of a matrix's weights whose saliency is below a threshold, between quantiles by a line."""
    for number in range(len(curve) - 1):
        low, high = curve[number], curve[number + 1]
        if threshold < high:
            inside = max(0.0, threshold - low) / (high - low)
            return (number + inside) / (len(curve) - 1)
    return 1.0
