"""Statistics of experts as if every token were routed to each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.model.targets import Target

Forward = Callable[..., Any]


@contextmanager
def all_tokens(block: nn.Module, targets: Sequence[Target], collecting: list[bool]) -> Iterator[None]:
    """Inside the `with`, the block runs every expert that has one of the targets on all tokens too.

    `collecting` holds one flag: whether the pass through an expert at this moment is such a one.

    Raises:
        ValueError: (inside) the class of the experts takes no choice of experts from outside.
    """
    stacks: dict[nn.Module, set[int]] = {}
    listed: dict[nn.Module, set[nn.Module]] = {}
    for target in targets:
        expert = target.pieces[0].expert
        if expert is not None:
            stacks.setdefault(target.owners[target.parameter][0], set()).add(expert)
        else:
            parent, own = _in_list(block, target)
            listed.setdefault(parent, set()).add(own)
    replaced: list[tuple[nn.Module, Forward]] = []
    for owner, experts in stacks.items():
        replaced.append((owner, _stacked(owner, sorted(experts), collecting)))
    for parent, modules in listed.items():
        replaced.append((parent, _with_list(parent, modules, collecting)))
    try:
        for module, forward in replaced:
            module.forward = forward
        yield
    finally:
        for module, _ in replaced:
            module.__dict__.pop("forward", None)


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


def _stacked(owner: nn.Module, experts: Sequence[int], collecting: list[bool]) -> Forward:
    """The forward of a module of stacked experts, with a run of each on all tokens before its own."""
    real = owner.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        collecting[0] = True
        for expert in experts:
            every = [*args, *kwargs.values()]
            named = {name: _forced(expert, value, every, owner) for name, value in kwargs.items()}
            real(*(_forced(expert, value, every, owner) for value in args), **named)
        collecting[0] = False
        return real(*args, **kwargs)

    return forward


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


def _with_list(parent: nn.Module, experts: set[nn.Module], collecting: list[bool]) -> Forward:
    """The forward of a module with a list of experts, with a run of each on all tokens before its own."""
    real = parent.forward

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        collecting[0] = True
        for expert in experts:
            expert(hidden.reshape(-1, hidden.shape[-1]))
        collecting[0] = False
        return real(hidden, *args, **kwargs)

    return forward
