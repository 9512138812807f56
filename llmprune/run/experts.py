"""Statistics of experts as if every token were routed to each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.model.target import Target

Forward = Callable[..., Any]


class AllTokens:
    """Lets a block run every expert that has one of some targets on all tokens too.

    Attributes:
        running: whether the pass through an expert at this moment is such a one.
    """

    def __init__(self, block: nn.Module, targets: Sequence[Target]) -> None:
        self.running = False
        stacks: dict[nn.Module, dict[int, None]] = {}
        lists: dict[nn.Module, dict[nn.Module, None]] = {}
        for target in targets:
            if target.expert is not None:
                stacks.setdefault(target.owners[target.parameter][0], {})[target.expert] = None
            else:
                parent, own = _in_list(block, target)
                lists.setdefault(parent, {})[own] = None
        self._forwards = [(owner, self._stacked(owner, sorted(numbers))) for owner, numbers in stacks.items()]
        self._forwards += [(parent, self._listed(parent, list(own))) for parent, own in lists.items()]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The experts do so inside the `with`.

        Raises:
            ValueError: (inside) the class of the experts takes no choice of experts from outside.
        """
        try:
            for module, forward in self._forwards:
                module.forward = forward
            yield
        finally:
            for module, _ in self._forwards:
                module.__dict__.pop("forward", None)

    @contextmanager
    def _running(self) -> Iterator[None]:
        self.running = True
        try:
            yield
        finally:
            self.running = False

    def _stacked(self, owner: nn.Module, experts: Sequence[int]) -> Forward:
        """The forward of a module of stacked experts, with a run of each on all tokens before its own."""
        real = owner.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            every = [*args, *kwargs.values()]
            with self._running():
                for expert in experts:
                    named = {name: _forced(expert, value, every, owner) for name, value in kwargs.items()}
                    real(*(_forced(expert, value, every, owner) for value in args), **named)
            return real(*args, **kwargs)

        return forward

    def _listed(self, parent: nn.Module, experts: Sequence[nn.Module]) -> Forward:
        """The forward of a module with a list of experts, with a run of each on all tokens before its own."""
        real = parent.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            with self._running():
                for expert in experts:
                    expert(hidden.reshape(-1, hidden.shape[-1]))
            return real(*args, **kwargs)

        return forward


def _in_list(block: nn.Module, target: Target) -> tuple[nn.Module, nn.Module]:
    """The module that holds the list of experts, and the expert of a target."""
    layer = target.layer
    for parent in block.modules():
        for child in parent.children():
            if isinstance(child, nn.ModuleList):
                for expert in child:
                    if any(module is layer for module in expert.modules()):
                        return parent, expert
    raise ValueError(f"{target.name} is of no list of experts")


def _choice(args: Sequence[Any]) -> Tensor | None:
    """The chosen experts among the arguments of a module, int [n, k]."""
    tensors = (value for value in args if isinstance(value, Tensor))
    return next((t for t in tensors if t.ndim == 2 and not t.is_floating_point()), None)


def _forced(expert: int, value: Any, args: Sequence[Any], owner: nn.Module) -> Any:
    """An argument as it would be if all tokens were routed to one expert alone."""
    chosen = _choice(args)
    if chosen is None:
        raise ValueError(
            f"{type(owner).__name__} does not get the choice of experts as an argument, so that its experts "
            "cannot be run on all tokens; use experts.tokens: routed"
        )
    if value is chosen:
        return torch.full_like(chosen[:, :1], expert)
    weights = isinstance(value, Tensor) and value.shape == chosen.shape and value.is_floating_point()
    return torch.ones_like(value[:, :1]) if weights else value
