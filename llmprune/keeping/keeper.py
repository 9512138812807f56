"""Keeps the zeros of a pruned model while a training loop of the user's own moves its weights."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from llmprune.common.messages import shown
from llmprune.keeping.kept import Kept
from llmprune.keeping.owned import base_of
from llmprune.keeping.places import find_places

if TYPE_CHECKING:
    from transformers import TrainerCallback

_SHORT = (torch.bfloat16, torch.float16)


class MaskKeeper:
    """Keeps pruned weights at zero in any training loop, and everything else out of their way.

    Gradients are masked as they are accumulated, so that a clipped norm and the moments of an optimizer see
    kept weights only. After each step of an attached optimizer pruned weights are set to +0, and so is its
    state there: Adam's first moment would move them though their gradient is zero. Masks take one bit per
    weight.

    Of a model with LoRA adapters of PEFT, the layers compute from now on with their change masked,
    `y = x (W + s k * (B A))^T`, which is what `merge_adapter` merges (PERP, arXiv:2312.15230; SQFT,
    arXiv:2410.03750). They stay so.

    Args:
        model: a transformers model in memory with dense weights, also with adapters of PEFT or inside
            `torch.compile` or DistributedDataParallel. Pruned weights that are -0 become +0.
        masks: an output folder, dense or packed, or a file of masks. None for the masks in the folder that
            the model was loaded from; where that has none, weights that are zero now stay zero, and a
            warning says so.

    Raises:
        ValueError: packed or quantised layers; no masks or those of another model; weights that are not zero
            where they prune; adapters that cannot be masked.
    """

    def __init__(self, model: nn.Module, masks: str | os.PathLike[str] | None = None) -> None:
        self.model = base_of(model)
        path = None if masks is None else _path(masks)
        adapting = "peft" in sys.modules  # else the model has no layers of PEFT
        if adapting:
            from llmprune.keeping.adapters import check_adapters, mask_layers

            check_adapters(self.model)
        self._places = find_places(self.model, path)
        self._adapters = mask_layers(self.model, self._places.kept) if adapting else None
        self._optimizers: dict[Optimizer, RemovableHandle] = {}
        self._hooked: dict[str, tuple[nn.Parameter, RemovableHandle]] = {}
        if self._places.origin is None:
            warnings.warn(f"MaskKeeper: {self._places.source}", stacklevel=2)

    def __enter__(self) -> MaskKeeper:
        self._hook()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()
        if kind is None:
            self.check()

    def attach(self, optimizer: Optimizer) -> MaskKeeper:
        """Mask gradients from now on, and pruned weights after each step of an optimizer.

        Returns:
            The keeper itself.

        Raises:
            ValueError: no optimizer of torch, or one that holds none of the pruned matrices though they are
                to be trained: sharded, or of another model.
        """
        inner: Any = optimizer
        while isinstance(getattr(inner, "optimizer", None), Optimizer):  # in the wrapper of accelerate
            inner = inner.optimizer
        if not isinstance(inner, Optimizer) or not hasattr(inner, "register_step_post_hook"):
            raise ValueError(f"optimizer must be one of torch.optim, got {shown(optimizer)}")
        held = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
        trained = self._trained()
        if trained and not any(id(kept.parameter) in held for kept in trained):
            raise ValueError(
                f"the optimizer holds none of the {len(trained)} pruned parameters of "
                f"{self._places.label}; make it from the same model's parameters() (sharded parameters, as "
                "of FSDP and DeepSpeed, cannot be masked)"
            )
        short = next((k.parameter.dtype for k in trained if k.parameter.dtype in _SHORT), None)
        if inner not in self._optimizers:
            self._optimizers[inner] = inner.register_step_post_hook(lambda *_: self.after_step())
            if short is not None:
                warnings.warn(f"MaskKeeper: {_rounding(short)}", stacklevel=2)
        self._hook()
        self.after_step()
        return self

    def detach(self) -> None:
        """Take all hooks off the parameters and optimizers; LoRA layers stay masked."""
        for handle in (*self._optimizers.values(), *(handle for _, handle in self._hooked.values())):
            handle.remove()
        self._optimizers.clear()
        self._hooked.clear()

    @torch.no_grad()
    def after_step(self) -> None:
        """Set pruned weights to +0, and the state of attached optimizers there.

        Call it after each step of an optimizer that is not attached.
        """
        self._hook()
        for kept in self._trained():
            states = [optimizer.state.get(kept.parameter, {}) for optimizer in self._optimizers]
            values = [value for state in states for value in state.values() if kept.like(value)]
            kept.clear(kept.parameter, *values)

    def zeros(self) -> dict[str, Any]:
        """Count the pruned weights, and those among them that are not +0.

        Returns:
            A dict with `model`, `matrices` (`name`, `shape`, `pruned`, `filled`), `pruned` and `filled` over
            all of them, and `dense`, the names of matrices without a mask.
        """
        matrices = list(self._places.counts())
        return {
            "model": self._places.label,
            "matrices": matrices,
            "pruned": sum(matrix["pruned"] for matrix in matrices),
            "filled": sum(matrix["filled"] for matrix in matrices),
            "dense": list(self._places.dense),
        }

    def check(self) -> dict[str, Any]:
        """As `zeros`, with an error where a pruned weight is filled.

        Raises:
            ValueError: pruned weights that are not +0, or an adapter that was put on after the keeper.
        """
        counts = self.zeros()
        if counts["filled"]:
            first = next(matrix for matrix in counts["matrices"] if matrix["filled"])
            raise ValueError(
                f"{counts['filled']:,} of {counts['pruned']:,} pruned weights of {counts['model']} are not "
                f"zero, {first['filled']:,} of them in {first['name']}; attach the optimizer, or call "
                "after_step() after each of its steps"
            )
        if self._adapters is not None:
            self._adapters.check()
        return counts

    def callback(self) -> TrainerCallback:
        """A callback for the `Trainer` of transformers.

        It attaches the optimizer when training begins, checks at every save and at the end, and then
        detaches.
        """
        from llmprune.keeping.callback import KeeperCallback

        return KeeperCallback(self)

    def describe(self) -> str:
        """What is kept, in a few lines: where the masks come from, how much they prune, what stays dense."""
        dense = self._places.dense
        more = f" and {len(dense) - 3} more" if len(dense) > 3 else ""
        lines = [repr(self), f"masks: {self._places.source}"]
        lines += [f"without a mask: {', '.join(dense[:3])}{more}"] if dense else []
        lines += [self._adapters.describe()] if self._adapters is not None else []
        short = {k.parameter.dtype for k in self._trained()} & {*_SHORT}
        return "\n".join([*lines, *map(_rounding, short)])

    def __repr__(self) -> str:
        places = self._places
        weights = sum(rows * columns for rows, columns in (target.shape for target in places.targets))
        pruned = sum(int((~kept.keep).sum()) for kept in places.kept.values())
        origin = "" if places.origin is not None else ", masks taken from the weights that are not zero"
        return (
            f"MaskKeeper of {places.label}: {pruned:,} of {weights:,} weights pruned in "
            f"{len(places.targets)} matrices{origin}"
        )

    def _trained(self) -> list[Kept]:
        """The parameters that are trained; frozen ones do not change."""
        return [kept for kept in self._places.kept.values() if kept.parameter.requires_grad]

    def _hook(self) -> None:
        """Mask the gradients of trained parameters as they are accumulated, before anything clips them."""
        for kept in self._trained():
            parameter = kept.parameter
            known = self._hooked.get(kept.name)
            if known is not None and known[0] is parameter:
                continue
            if known is not None:
                known[1].remove()
            handle = parameter.register_post_accumulate_grad_hook(_gradient_hook(kept))
            self._hooked[kept.name] = parameter, handle


def _gradient_hook(kept: Kept) -> Any:
    def mask(parameter: Tensor) -> None:
        if parameter.grad is not None:
            kept.clear(parameter.grad)

    return mask


def _path(masks: Any) -> Path:
    if not isinstance(masks, (str, os.PathLike)) or not os.fspath(masks):
        raise ValueError(f"masks must be a path, got {shown(masks)}")
    return Path(os.fspath(masks)).expanduser()


def _rounding(dtype: torch.dtype) -> str:
    name, step = str(dtype).removeprefix("torch."), 512 if dtype == torch.bfloat16 else 4096
    return (
        f"the trained weights are {name}, in which a step below 1/{step} of a weight changes nothing; train "
        "in float32 (model.float()), with autocast for speed"
    )
