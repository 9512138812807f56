"""The prunable matrices of a block, every oddity turned into a plain [R, C] view (out_features, in_features)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Target:
    """One prunable matrix: its module, the parameter's name, and whether the parameter is stored as [C, R]."""

    name: str  # of the module
    module: nn.Module
    transposed: bool

    @property
    def weight_name(self) -> str:
        """The name of the weight in the model."""
        return f"{self.name}.weight"

    @property
    def shape(self) -> tuple[int, int]:
        """(R, C): out_features, in_features."""
        a, b = self.module.weight.shape  # type: ignore[misc]
        return (int(b), int(a)) if self.transposed else (int(a), int(b))

    def read(self, stored: Tensor) -> Tensor:
        """The weight as [R, C] in float32 on the module's device, from its stored form; not a copy where it is that already."""
        loaded: Tensor = self.module.weight.detach()  # type: ignore[operator]
        exact = (
            loaded if loaded.dtype == torch.float32 else stored
        )  # a compute dtype may have rounded what was loaded
        return self.oriented(exact).to(loaded.device, torch.float32).contiguous()

    def oriented(self, stored: Tensor) -> Tensor:
        """A weight laid out as stored, seen as [R, C]."""
        return stored.T if self.transposed else stored

    def view(self, stored: Tensor) -> Tensor:
        """A stored weight as [R, C] in float32, on the module's device."""
        device: torch.device = self.module.weight.device  # type: ignore[assignment]
        return self.oriented(stored).to(device, torch.float32).contiguous()

    def assign(self, stored: Tensor) -> None:
        """Put a weight, laid out as stored, into the module, on its device and in its dtype."""
        old: Tensor = self.module.weight  # type: ignore[assignment]
        self.module.weight = nn.Parameter(stored.to(old.device, old.dtype), requires_grad=False)

    def stored(self, weight: Tensor) -> Tensor:
        """A weight [R, C] laid out as the checkpoint stores it."""
        return (weight.T if self.transposed else weight).contiguous()


def find_targets(block_name: str, block: nn.Module) -> list[Target]:
    """Every linear matrix of a block, in the order of the network.

    Raises:
        ValueError: the block stacks matrices in 3-D parameters (mixture of experts), which would silently stay dense.
    """
    from transformers.pytorch_utils import Conv1D

    for name, parameter in block.named_parameters():
        if parameter.ndim > 2:
            raise ValueError(
                f"{block_name}.{name} stacks experts in one {parameter.ndim}-D parameter; mixtures of experts are not supported yet"
            )
    return [
        Target(f"{block_name}.{name}", module, isinstance(module, Conv1D))
        for name, module in block.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    ]
