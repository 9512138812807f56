"""MaskLLM (Fang et al., arXiv 2409.17481): weights stay; for every group of M weights one of all N:M
patterns is
learned, through probabilities that harden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from llmprune.contracts import Pattern
from llmprune.patterns import NM
from llmprune.recovery.parts import Matrix, Trainable
from llmprune.recovery.phases import Phase

_MOST = 128  # patterns of a group; each costs a logit and its moments


class Patterns(Trainable):
    """V = W * sum_p y_p pattern_p, y = softmax((kappa P + Gumbel noise) / tau), P the logits [R, C / M,
    patterns].

    While masks are frozen, V is W where it is kept.
    """

    revives = True

    based = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of learned patterns.

        Attributes:
            kappa_first, kappa_last: the scale of the logits at the start and at the end.
            tau_first, tau_last: the temperature, likewise.
            deviation: of the logits at the start.
            prior: how strongly the mask of the start is preferred, in deviations for each weight that a
                pattern keeps with it; of a dense start that of the largest weights.
            penalty: of the loss for small V: `- penalty * ||V||^2`, falling to zero.
        """

        kappa_first: float = 100.0
        kappa_last: float = 500.0
        tau_first: float = 4.0
        tau_last: float = 0.05
        deviation: float = 0.01
        prior: float = 3.0
        penalty: float = 1e-5

        def __post_init__(self) -> None:
            for name in ("kappa_first", "kappa_last", "tau_first", "tau_last", "deviation"):
                if not getattr(self, name) > 0:
                    raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
            for name in ("prior", "penalty"):
                if getattr(self, name) < 0:
                    raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")

    def sizes(self, shape: tuple[int, int], pattern: Pattern | None) -> tuple[int, int]:
        found = _learnable(pattern)
        return shape[0] * shape[1] // found.width * math.comb(found.width, found.n), 0

    def start(self, matrix: Matrix, generator: torch.Generator) -> None:
        pattern = _learnable(matrix.pattern)
        kinds = list(combinations(range(pattern.width), pattern.n))
        base = matrix.weight.detach()
        if matrix.origin is not None:
            base = torch.where(matrix.keep, base, matrix.origin().to(base))
        table = torch.zeros(len(kinds), pattern.width, dtype=torch.float32)
        for number, kind in enumerate(kinds):
            table[number, list(kind)] = 1
        table = table.to(base.device)
        groups = matrix.first_mask().view(len(base), -1, pattern.width).float()
        deviation = self.config.deviation
        noise = torch.randn(*groups.shape[:2], len(kinds), generator=generator, dtype=torch.float32)
        prior = (groups @ table.T - 1) * deviation * self.config.prior
        self.fixed = {"base": base, "table": table}
        self.tensors = {"logits": (noise.to(base.device) * deviation + prior).requires_grad_()}
        self._seed = int(torch.randint(1 << 62, (1,), generator=generator))

    def weight(self, keep: Tensor, phase: Phase) -> Tensor:
        base, logits = self.fixed["base"].float(), self.tensors["logits"]
        if phase.frozen:
            return torch.where(keep, base, 0.0)
        # The same noise whenever the weight of a step is made: activations may be computed twice.
        generator = torch.Generator().manual_seed((self._seed + phase.step) % (1 << 62))
        uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float32).to(logits.device)
        return base * self.soft(-torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7))), phase.progress)

    def soft(self, noise: Tensor, progress: float) -> Tensor:
        """The soft mask [R, C], given Gumbel noise like the logits."""
        c = self.config
        kappa = c.kappa_first + (c.kappa_last - c.kappa_first) * progress
        tau = c.tau_first + (c.tau_last - c.tau_first) * progress
        shares = torch.softmax((kappa * self.tensors["logits"] + noise) / tau, dim=-1)
        soft: Tensor = (shares @ self.fixed["table"]).flatten(1)
        return soft

    def penalty(self, weight: Tensor, phase: Phase) -> Tensor | None:
        amount = self.config.penalty * (1 - phase.progress)
        return -amount * weight.float().square().sum() if amount else None

    @torch.no_grad()
    def learned(self, phase: Phase) -> Tensor | None:
        """1 where the likeliest pattern of the group keeps a weight, else 0."""
        best = self.tensors["logits"].argmax(dim=-1)
        chosen: Tensor = one_hot(best, len(self.fixed["table"])).float() @ self.fixed["table"]
        return chosen.flatten(1)

    def compared(self, keep: Tensor) -> Tensor:
        return self.fixed["base"].float()

    def merge(self, keep: Tensor) -> Tensor:
        return torch.where(keep, self.fixed["base"].float(), 0.0)


def _learnable(pattern: Pattern | None) -> NM:
    """The pattern. Raises `ValueError` where it is not N:M, or its groups have too many patterns."""
    if not isinstance(pattern, NM):
        raise ValueError(f"patterns are learned for N:M masks, got pattern {pattern}; use --pattern 2:4")
    count = math.comb(pattern.width, pattern.n)
    if count > _MOST:
        raise ValueError(
            f"pattern {pattern} has {count} patterns of a group, more than {_MOST}; use --pattern 2:4"
        )
    return pattern
