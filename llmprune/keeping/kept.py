"""One parameter of a model in memory, and which of its entries are pruned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmprune.checkpoint.masks import pack, unpack, where_bytes

_WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


class Kept:
    """A parameter with its keep mask, which is held as one bit per weight.

    Args:
        name: of the parameter in the plain transformers model.
        owner: the module that has it. leaf: its name there.
        keep: bool of the parameter's shape, True where a weight is kept.
    """

    def __init__(self, name: str, owner: nn.Module, leaf: str, keep: Tensor) -> None:
        self.name, self.owner, self.leaf, self.shape = name, owner, leaf, keep.shape
        self._bits = pack(keep.reshape(1, -1))

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as the model has it now, since frameworks put new ones in its place.

        Raises:
            ValueError: it is gone, was moved off the device, or is held in another form.
        """
        found = self.owner._parameters.get(self.leaf)
        if found is None or found.shape != self.shape or type(found.data) is not Tensor:
            form = "gone" if found is None else f"{type(found.data).__name__} {list(found.shape)}"
            raise ValueError(
                f"{self.name} is {form}, where a plain tensor {list(self.shape)} is needed; "
                "sharded and quantised weights cannot be masked"
            )
        if found.is_meta:
            raise ValueError(f"{self.name} is on the meta device (offloaded?); load the model wholly")
        return found

    @property
    def keep(self) -> Tensor:
        """The keep mask, bool of the parameter's shape, on its device."""
        device, weights = self.parameter.device, self.shape.numel()
        if self._bits.device != device:
            self._bits = self._bits.to(device)
        keep = unpack(self._bits, weights) if self._bits.is_cpu else unpacked_there(self._bits, weights)
        return keep.view(self.shape)

    def like(self, value: object) -> bool:
        """Whether a value of an optimizer's state has an entry for each weight."""
        if type(value) is not Tensor or value.shape != self.shape:
            return False
        return value.is_floating_point() and value.element_size() in _WHOLE

    def clear(self, *tensors: Tensor) -> None:
        """Set tensors of the parameter's shape to +0 where it is pruned, in place, whatever stands there."""
        keep = self.keep
        for tensor in tensors:
            # Products of whole numbers: of floats they would give -0 and keep NaN, and are no faster.
            tensor.detach().view(_WHOLE[tensor.element_size()]).mul_(keep)

    def filled(self) -> Tensor:
        """Where pruned weights are anything but +0, bool of the parameter's shape."""
        return where_bytes(self.parameter.detach()) & ~self.keep


def unpacked_there(bits: Tensor, weights: int) -> Tensor:
    """As `unpack` of one row [1, ceil(C / 8)], on whatever device the bits are; on a CPU numpy is faster."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.view(-1, 1) >> places) & 1).view(1, -1)[:, :weights].bool()
