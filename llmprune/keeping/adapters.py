"""LoRA adapters of PEFT on a pruned model: which can be masked, and a merge that fills no zero."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Embedding, Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from llmprune.common.messages import shown
from llmprune.keeping.kept import Kept
from llmprune.keeping.lora import MaskedLinear
from llmprune.keeping.owned import base_of, plain_name
from llmprune.keeping.places import find_places

_ELSE = "only plain LoRA on linear layers can be masked"
# What starts an adapter by taking it out of the base weights, which fills zeros.
_MOVING = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Layer(NamedTuple):
    """A LoRA layer.

    Attributes:
        name: of the linear layer that it is around.
        module: the layer itself.
        kept: the weight of the linear layer, where that has a mask.
    """

    name: str
    module: Any
    kept: Kept | None

    @property
    def adapters(self) -> list[str]:
        """The names of its active adapters."""
        return [name for name in self.module.active_adapters if name in self.module.lora_A]


@dataclass(frozen=True)
class Adapters:
    """The LoRA layers of a model.

    Attributes:
        base: the transformers model that they are in.
        kept: the parameters that have a mask.
        layers: all of them.
        fresh: those that a keeper has not masked before.
    """

    base: nn.Module
    kept: Mapping[str, Kept]
    layers: list[Layer]
    fresh: list[Layer]

    def check(self) -> None:
        """Raise `ValueError` for a layer that was put on later and would fill zeros."""
        for layer in _layers(self.base, self.kept):
            if layer.kept is not None and not isinstance(layer.module, MaskedLinear):
                raise ValueError(f"the adapter on {layer.name} came after the MaskKeeper; make a new one")

    def describe(self) -> str:
        """How many there are of each kind, in a line."""
        plain = [layer.name for layer in self.layers if layer.kept is None]
        named = f": {', '.join(plain[:3])}{', ...' if len(plain) > 3 else ''}" if plain else ""
        masked = len(self.layers) - len(plain)
        return f"LoRA layers: {masked} masked, {len(plain)} plain, as their matrices have no mask{named}"

    def dropped(self) -> float:
        """The share of the squared change of fresh layers that falls on pruned weights."""
        lost = total = 0.0
        for layer in self.fresh:
            assert layer.kept is not None
            for name in layer.adapters:
                change = Linear.get_delta_weight(layer.module, name).detach().double()
                total += float(change.square().sum())
                lost += float(change[~layer.kept.keep].square().sum())
        return lost / total if total else 0.0


def check_adapters(model: nn.Module) -> None:
    """Raise `ValueError` for an adapter that cannot be masked.

    Args:
        model: the transformers model that they are in.
    """
    configs = getattr(model, "peft_config", None)
    for name, config in configs.items() if isinstance(configs, dict) else ():
        start = getattr(config, "init_lora_weights", True)
        if str(config.peft_type.value) != "LORA":
            raise ValueError(f"the adapter {shown(name)} is {config.peft_type.value}; {_ELSE}")
        if config.bias != "none":
            raise ValueError(
                f"the adapter {shown(name)} trains biases (bias={shown(config.bias)}); set bias='none'"
            )
        if isinstance(start, str) and start.startswith(_MOVING):
            raise ValueError(
                f"the adapter {shown(name)} began with init_lora_weights={shown(start)}, which moves base "
                "weights and so fills zeros; leave it at True"
            )
        if getattr(config, "layer_replication", None):
            raise ValueError(f"the adapter {shown(name)} has layer_replication, which cannot be masked")
    _layers(model, {})


def mask_layers(model: nn.Module, kept: Mapping[str, Kept]) -> Adapters | None:
    """Mask the LoRA layers over masked matrices, in place; None where the model has no layers of PEFT.

    Args:
        model: the transformers model that they are in.
        kept: the parameters that have a mask.

    Raises:
        ValueError: a layer that has been masked with another mask.
    """
    layers = _layers(model, kept)
    masked = [layer for layer in layers if layer.kept is not None]
    fresh = [layer for layer in masked if not isinstance(layer.module, MaskedLinear)]
    for layer in layers:
        old, new = getattr(layer.module, "kept", None), layer.kept
        if old is not None and (new is None or not torch.equal(old.keep, new.keep)):
            raise ValueError(
                f"{layer.name} is masked with another mask already; give the masks of its MaskKeeper, or none"
            )
    found = Adapters(model, kept, layers, fresh)
    for layer in masked:
        assert layer.kept is not None
        MaskedLinear.of(layer.module, layer.kept, found)
    return found if layers else None


def merge(model: Any, path: Path | None) -> Any:
    """Merge the active LoRA adapters of a `PeftModel`, as `llmprune.merge_adapter` says of it."""
    base = base_of(model)
    check_adapters(base)
    found: Adapters | None = next((m.among for m in base.modules() if isinstance(m, MaskedLinear)), None)
    if path is not None or found is None:
        places = find_places(base, path)
        if places.origin is None:
            warnings.warn(f"merge_adapter: {places.source}", stacklevel=4)
        found = mask_layers(base, places.kept)
        lost = 0.0 if found is None else found.dropped()
        if lost:
            warnings.warn(
                f"merge_adapter: {lost:.1%} of the adapter's squared change falls on pruned weights and is "
                "dropped; unless it was trained within a MaskKeeper, which masks it, the merged model is not "
                "the one that was trained",
                stacklevel=4,
            )
    if found is None or not any(layer.adapters for layer in found.layers):
        raise ValueError("the model has no active LoRA adapter to merge; set_adapter(NAME) makes one active")
    found.check()
    _check_values(found)
    merged = model.merge_and_unload()
    merged.__dict__.pop("peft_config", None)  # left behind before PEFT 0.19
    assert not any(bool(kept.filled().any()) for kept in found.kept.values())
    return merged


def _layers(model: nn.Module, kept: Mapping[str, Kept]) -> list[Layer]:
    """The LoRA layers of a model. Raises `ValueError` for one that cannot be masked."""
    by_owner = {(one.owner, one.leaf): one for one in kept.values()}
    embeddings = getattr(model.get_input_embeddings(), "weight", None)  # type: ignore[operator]
    found = []
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            name, inner = plain_name(path), module.get_base_layer()
            _check_layer(name, module)
            if inner.weight is embeddings:
                raise ValueError(
                    f"the adapter on {name} is over a weight that it shares with the input embeddings; leave "
                    "it out of target_modules"
                )
            found.append(Layer(name, module, by_owner.get((inner, "weight"))))
    return found


def _check_layer(name: str, layer: Any) -> None:
    """Raise `ValueError` for an adapter layer whose change cannot be masked."""
    inner = layer.get_base_layer()
    if isinstance(layer, Embedding):
        raise ValueError(f"the adapter on {name} is over embeddings; {_ELSE}, leave it out of target_modules")
    if type(layer) not in (Linear, MaskedLinear) or not isinstance(inner, (nn.Linear, Conv1D)):
        raise ValueError(
            f"the adapter on {name} is {type(layer).__name__} of {type(inner).__name__}; {_ELSE}"
        )
    assert isinstance(layer, LoraLayer)
    variant = next(iter(layer.lora_variant.values()), None)
    if variant is not None:
        kind = "DoRA" if any(layer.use_dora.values()) else type(variant).__name__.removesuffix("Variant")
        raise ValueError(f"the adapter on {name} is {kind}, which changes more than B A; {_ELSE}")
    if any(layer.lora_bias.values()):
        raise ValueError(f"the adapter on {name} trains a bias (lora_bias); set lora_bias=False")
    if layer.merged:
        raise ValueError(f"the adapter on {name} is merged already; call unmerge_adapter() first")


def _check_values(adapters: Adapters) -> None:
    """Raise `ValueError` for zeros that were filled before, and NaN or Inf in an active adapter."""
    for name, kept in adapters.kept.items():
        if filled := int(kept.filled().sum()):
            raise ValueError(
                f"{filled:,} pruned weights of {name} are not zero, so they were changed beside the adapter; "
                "nothing was merged"
            )
    for layer in adapters.layers:
        for name in layer.adapters:
            for part in (layer.module.lora_A[name], layer.module.lora_B[name]):
                if not bool(part.weight.isfinite().all()):
                    raise ValueError(
                        f"the adapter {shown(name)} on {layer.name} holds NaN or Inf; nothing was merged"
                    )
