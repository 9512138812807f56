"""The parameters of a model in memory, by the names that they have without PEFT."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from llmprune.common.messages import shown
from llmprune.model.quantised import check_dense
from llmprune.model.skeleton import Skeleton
from llmprune.model.target import Target
from llmprune.runtime.layers import PackedLinear
from llmprune.runtime.semi_structured import TwoOfFourLinear

Owned = Mapping[str, tuple[nn.Module, str]]  # name of a parameter -> its module, and its name there
# What PEFT calls a module that it has put another one around: for an adapter, and for a copy that is trained.
_ADAPTED, _COPIED = "base_layer", "original_module"


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model inside what torch and PEFT put around it.

    Raises:
        ValueError: there is none.
    """
    inner = model
    while isinstance(inner, nn.Module):
        if isinstance(getattr(inner, "_orig_mod", None), nn.Module):  # of torch.compile
            inner = inner._orig_mod  # type: ignore[assignment]
        elif hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()  # type: ignore[operator]
        elif hasattr(getattr(inner, "config", None), "get_text_config"):
            return inner
        else:
            inner = getattr(inner, "module", None)  # type: ignore[assignment]  # of DistributedDataParallel
    raise ValueError(
        f"model must be a transformers model in memory, got {shown(model)}; llmprune.load makes one"
    )


def check_layers(model: nn.Module) -> None:
    """Raise `ValueError` for a model with weights that cannot be trained: packed or quantised ones."""
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            raise ValueError(
                f"{name} is a packed layer, which cannot be trained; load the folder with "
                "llmprune.load(FOLDER, dequantize=True)"
            )
        if isinstance(module, TwoOfFourLinear):
            raise ValueError(
                f"{name} was accelerated and has its weight twice, of which training moves one; train the "
                "model before llmprune.accelerate"
            )
    check_dense(model.config.to_dict(), "the model in memory")  # type: ignore[union-attr, operator]


def plain_name(name: str) -> str:
    """A name without what PEFT has put into it."""
    return ".".join(part for part in name.split(".") if part not in (_ADAPTED, _COPIED))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by their names without PEFT; what it has added is there too."""
    return {plain_name(name): tensor for name, tensor in model.state_dict().items()}


def found(model: nn.Module, skeleton: Skeleton, targets: Iterable[Target]) -> Owned:
    """Where a model has the parameters of some matrices, by their names in its skeleton.

    Raises:
        ValueError: it has them not, in another shape, or as a copy of PEFT's that is trained.
    """
    places = {
        plain_name(f"{path}.{leaf}" if path else leaf): (path, module, leaf)
        for path, module in model.named_modules()
        for leaf in module._parameters
    }
    prefix = f"{getattr(skeleton.model, 'base_model_prefix', '')}."
    owned = {}
    for name in dict.fromkeys(name for target in targets for name in target.owners):
        place = places.get(name) or places.get(name.removeprefix(prefix))
        wanted = skeleton.model.get_parameter(name).shape
        if place is None or place[1].get_parameter(place[2]).shape != wanted:
            raise ValueError(
                f"{type(model).__name__} has no weight {name} of shape {list(wanted)}, which the masks are "
                "for; load the model anew from its folder"
            )
        path, module, leaf = place
        if _COPIED in path.split("."):
            raise ValueError(
                f"modules_to_save of the adapter trains a copy of {name}, which would fill its zeros; leave "
                "it out of modules_to_save"
            )
        owned[name] = module, leaf
    return owned
