"""The masks of a training, a bit per weight in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping

import numpy as np
import torch
from torch import Tensor

_WEIGHTS = (1, 2, 4, 8, 16, 32, 64, 128)


class Keeps(MutableMapping[str, Tensor]):
    """Masks by name, bool of any shape; each is made of its bits when it is read."""

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self._held: dict[str, tuple[Tensor, torch.Size]] = {}
        self.update(masks)

    def __getitem__(self, name: str) -> Tensor:
        bits, shape = self._held[name]
        if bits.is_cpu:
            whole = np.unpackbits(bits.numpy(), count=shape.numel(), bitorder="little")
            return torch.from_numpy(whole.view(np.bool_)).view(shape)
        weights = torch.tensor(_WEIGHTS, dtype=torch.uint8, device=bits.device)
        return (bits[:, None] & weights).ne(0).flatten()[: shape.numel()].view(shape)

    def __setitem__(self, name: str, keep: Tensor) -> None:
        flat = keep.reshape(-1)
        if keep.is_cpu:
            bits = torch.from_numpy(np.packbits(flat.numpy(), bitorder="little"))
        else:
            whole = torch.nn.functional.pad(flat.to(torch.uint8), (0, -len(flat) % 8)).view(-1, 8)
            weights = torch.tensor(_WEIGHTS, dtype=torch.uint8, device=keep.device)
            bits = (whole * weights).sum(1, dtype=torch.uint8)
        self._held[name] = bits, keep.shape

    def __delitem__(self, name: str) -> None:
        del self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)
