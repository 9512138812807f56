"""The whole model as a function of the weights that are trained, with the activations of one block in memory.

n sequences, T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from llmprune.model.opening import Model
from llmprune.model.skeleton import Skeleton
from llmprune.model.target import Target
from llmprune.model.targets import all_targets


def filled(model: Model) -> Skeleton:
    """A skeleton of its own with all weights of a model, on its device and in its dtype."""
    from llmprune.model.config import read_config

    old, trust = model.skeleton, model.options.trust_remote_code
    if model.located is not None:
        config = read_config(model.located.folder, trust, model.options.dequantize)
    else:
        config = old.model.config
    new = Skeleton(config, model.source, old.dtype, old.device, trust, old.given_blocks)
    all_targets(new)  # before the weights are loaded: finding those of experts frees what it has read
    new.load(list(new.group_of))
    return new


class Student:
    """A model whose matrices, and other tensors, are given with every call.

    Args:
        skeleton: with all weights loaded.
        names: of the matrices that are given, by `Target.key`, and of stored tensors that are.
        recompute: keep the activations of no block: what a block computes is computed again in the backward
            pass, its weights included, so that memory is for one block at a time.

    Raises:
        ValueError: (when it is called) a block that does not run with gradients.
    """

    def __init__(self, skeleton: Skeleton, names: Iterable[str], recompute: bool = True) -> None:
        self.skeleton, self._recompute = skeleton, recompute
        wanted = set(names)
        self.targets = {t.key: t for t in all_targets(skeleton) if t.key in wanted}
        self._inside: dict[str, list[Target]] = {}
        for target in self.targets.values():
            self._inside.setdefault(self._block_of(target.parameter), []).append(target)
        self._plain: dict[str, list[str]] = {}  # stored tensor -> the parameters that are this tensor
        for name in wanted - set(self.targets):
            self._plain[name] = [p for p, g in skeleton.group_of.items() if g.tensors == (name,)]
        self._weights: Mapping[str, Tensor] = {}
        self._hidden: list[Tensor] | None = None
        self._running: set[str] = set()
        for name, block in skeleton.blocks.items():
            block.forward = self._wrapped(name, block)

    def _block_of(self, parameter: str) -> str:
        return next((b for b in self.skeleton.blocks if parameter.startswith(f"{b}.")), "")

    def __call__(
        self, weights: Mapping[str, Tensor], tokens: Tensor, hidden: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits [n, T, vocabulary], and with `hidden` the outputs of every block, [n, T, D] each."""
        self._weights, self._hidden = weights, [] if hidden else None
        outside = {
            parameter: self._cast(weights[name], parameter)
            for name, parameters in self._plain.items()
            for parameter in parameters
            if not self._block_of(parameter)
        }
        given = {"input_ids": tokens.to(self.skeleton.device), "use_cache": False}
        model = self.skeleton.model
        result = functional_call(model, outside, (), given) if outside else model(**given)
        return result.logits, self._hidden or []

    def _cast(self, tensor: Tensor, parameter: str) -> Tensor:
        return tensor.to(self.skeleton.model.get_parameter(parameter).dtype)

    def _wrapped(self, name: str, block: nn.Module) -> Callable[..., Any]:
        original = block.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            self._running.add(name)
            try:
                return functional_call(block, self._parameters(name), args, kwargs)
            finally:
                self._running.discard(name)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if name in self._running:  # called by `functional_call`, with its weights in place
                return original(*args, **kwargs)
            if self._recompute and torch.is_grad_enabled():
                result = checkpoint(call, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
            else:
                result = call(*args, **kwargs)
            if self._hidden is not None:
                self._hidden.append(result[0] if isinstance(result, (tuple, list)) else result)
            return result

        return forward

    def _parameters(self, block: str) -> dict[str, Tensor]:
        """The parameters of a block that are given, by name in it."""
        found = assembled(self.skeleton.model, self._inside.get(block, ()), self._weights)
        for name, parameters in self._plain.items():
            for parameter in parameters:
                if self._block_of(parameter) == block:
                    found[parameter] = self._cast(self._weights[name], parameter)
        return {name.removeprefix(f"{block}."): tensor for name, tensor in found.items()}

    def layers(self) -> dict[str, nn.Module]:
        """The linear layers of the matrices, by the matrices' names.

        Raises:
            ValueError: a matrix without a layer, in a stack of experts.
        """
        found = {}
        for key, target in self.targets.items():
            if target.layer is None:
                raise ValueError(
                    f"the inputs of {key}, in a stack of experts, cannot be seen; take rule magnitude"
                )
            found[key] = target.layer
        return found


def assembled(
    model: nn.Module, targets: Iterable[Target], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The parameters of a model that hold some matrices, by name, with other weights [R, C] in them.

    Gradients flow back to the weights, which go by `Target.key`.
    """
    found: dict[str, Tensor] = {}
    for target in targets:
        weight = weights[target.key]
        if target.module is not None:
            dtype = model.get_parameter(target.parameter).dtype
            found[target.parameter] = (weight.T if target.turned else weight).to(dtype)
            continue
        for parameter in target.owners:
            if parameter not in found:
                found[parameter] = model.get_parameter(parameter).detach().clone()
        target.scatter(weight, found)
    return found
