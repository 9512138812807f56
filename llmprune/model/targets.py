"""The prunable matrices of a block, as [R, C] (out_features, in_features) however the model stores them.

"As stored" means in the layout of the checkpoint and the module, which is [C, R] for `Conv1D`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Target:
    """One prunable matrix.

    Attributes:
        name: of its module.
        module: which has the matrix as `weight`.
        transposed: whether the matrix is stored as [C, R].
    """

    name: str
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
        """The weight as [R, C] in float32 on the module's device; a copy only if necessary.

        `stored` is the same weight from the checkpoint. It is used if the module's weight is not float32,
        since then it may have been rounded when it was loaded.
        """
        loaded: Tensor = self.module.weight.detach()  # type: ignore[operator]
        exact = loaded if loaded.dtype == torch.float32 else stored
        return self.oriented(exact).to(loaded.device, torch.float32).contiguous()

    def oriented(self, stored: Tensor) -> Tensor:
        """A [R, C] view of a stored weight."""
        return stored.T if self.transposed else stored

    def view(self, stored: Tensor) -> Tensor:
        """A stored weight as [R, C] in float32, on the module's device."""
        device: torch.device = self.module.weight.device  # type: ignore[assignment]
        return self.oriented(stored).to(device, torch.float32).contiguous()

    def assign(self, stored: Tensor) -> None:
        """Put a stored weight into the module, on its device and in its dtype."""
        old: Tensor = self.module.weight  # type: ignore[assignment]
        self.module.weight = nn.Parameter(stored.to(old.device, old.dtype), requires_grad=False)

    def stored(self, weight: Tensor) -> Tensor:
        """A weight [R, C] in the layout in which it is stored."""
        return (weight.T if self.transposed else weight).contiguous()


def find_targets(block_name: str, block: nn.Module) -> list[Target]:
    """Every linear matrix of a block, in the order of its modules.

    Raises:
        ValueError: the block has matrices stacked in a 3-D parameter (mixture of experts), which would stay
            dense.
    """
    from transformers.pytorch_utils import Conv1D

    for name, parameter in block.named_parameters():
        if parameter.ndim > 2:
            raise ValueError(
                f"{block_name}.{name} stacks experts in one {parameter.ndim}-D parameter; "
                "mixtures of experts are not supported yet"
            )
    return [
        Target(f"{block_name}.{name}", module, isinstance(module, Conv1D))
        for name, module in block.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    ]
