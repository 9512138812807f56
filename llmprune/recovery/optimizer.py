"""AdamW and SGD on single tensors, with state that can be zeroed, saved and restored entry by entry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.recovery.masking import scaled

METHODS = ("adamw", "sgd")


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    """How tensors move.

    Attributes:
        name: `adamw` or `sgd`.
        betas: of AdamW; of SGD the first one is the momentum.
        eps: added to the root of the second moment.
        weight_decay: decoupled, of all entries. Where pruned weights are trained too, it pulls them to zero.
    """

    name: str = "adamw"
    betas: tuple[float, ...] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise ValueError(f"optimizer must be one of {', '.join(METHODS)}, got {self.name!r}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas must be two numbers in [0, 1), got {self.betas}")
        if not self.eps > 0:
            raise ValueError(f"optimizer.eps must be above 0, got {self.eps}")
        if not 0 <= self.weight_decay < 1:
            raise ValueError(f"optimizer.weight_decay must be in [0, 1), got {self.weight_decay}")


class Optimizer:
    """The state of tensors by name, made when they first move.

    Args:
        spec: how they move.
        decays: whether pruned weights are pulled to zero, as in AST: then the second moment is that of the
            sum of momentum and pull.
    """

    def __init__(self, spec: OptimizerSpec, decays: bool = False) -> None:
        self._spec, self._decays = spec, decays
        self.steps: dict[str, int] = {}
        self.state: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(
        self, name: str, tensor: Tensor, gradient: Tensor, rate: float, keep: Tensor | None, lam: float
    ) -> None:
        """Move a tensor in place.

        Args:
            name: under which its state is kept.
            tensor: float32.
            gradient: of its shape.
            rate: the learning rate.
            keep: its keep mask; None where it has none.
            lam: lambda, of the pull on pruned weights.
        """
        spec = self._spec
        self.steps[name] = count = self.steps.get(name, 0) + 1
        if spec.name == "sgd":
            pulled = lam and keep is not None
            self._descend(name, tensor, gradient + lam * _pruned(tensor, keep) if pulled else gradient, rate)
            return
        state = self.state.get(name)
        if state is None:
            zeros = (torch.zeros_like(tensor) for _ in range(2))
            state = self.state[name] = dict(zip(("mean", "square"), zeros, strict=True))
        mean, square = state["mean"], state["square"]
        first, second = spec.betas
        mean.lerp_(gradient, 1 - first)
        move, squared = mean, gradient
        if self._decays and keep is not None:
            # The pull must not pass through the normalisation alone: a weight without a gradient would move
            # by a whole step (AST, arXiv 2407.20584).
            move = mean + lam * _pruned(tensor, keep) if lam else mean
            squared = move
        square.mul_(second).addcmul_(squared, squared, value=1 - second)
        size = (square / (1 - second**count)).sqrt_().add_(spec.eps)
        self._decay(tensor, rate)
        tensor.addcdiv_(move, size, value=-rate / (1 - first**count))

    def _descend(self, name: str, tensor: Tensor, gradient: Tensor, rate: float) -> None:
        momentum = self._spec.betas[0]
        if name not in self.state:
            self.state[name] = {"mean": torch.zeros_like(tensor)}
        mean = self.state[name]["mean"]
        mean.mul_(momentum).add_(gradient)
        self._decay(tensor, rate)
        tensor.add_(mean, alpha=-rate)

    def _decay(self, tensor: Tensor, rate: float) -> None:
        if self._spec.weight_decay:
            tensor.mul_(1 - rate * self._spec.weight_decay)

    def forget(self, name: str, keep: Tensor) -> None:
        """Zero the state of every entry that is not kept: else momentum would move what is pruned."""
        for moment in self.state.get(name, {}).values():
            moment.copy_(scaled(moment, keep, 0.0))

    def moments(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Both moments of AdamW, corrected for their start; None before the first step, or without them."""
        state, count = self.state.get(name, {}), self.steps.get(name, 0)
        if not count or "square" not in state:
            return None
        first, second = self._spec.betas
        return state["mean"] / (1 - first**count), state["square"] / (1 - second**count)

    def drop(self, name: str) -> None:
        """Forget a tensor altogether."""
        self.state.pop(name, None)
        self.steps.pop(name, None)

    def saved(self) -> dict[str, Tensor]:
        """All moments, by name."""
        return {f"{name}/{part}": t for name, state in self.state.items() for part, t in state.items()}

    def restore(self, tensors: Mapping[str, Tensor], steps: Mapping[str, int]) -> None:
        """Put back what `saved` and `steps` were."""
        self.state, self.steps = {}, dict(steps)
        for key, tensor in tensors.items():
            name, _, part = key.rpartition("/")
            self.state.setdefault(name, {})[part] = tensor


def _pruned(tensor: Tensor, keep: Tensor | None) -> Tensor:
    """The entries that are not kept, zero elsewhere."""
    assert keep is not None
    return torch.where(keep, 0.0, tensor)
