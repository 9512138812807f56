"""Packs the tensors that a run or a conversion writes; `packed_tensor` says how a packed tensor lies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from llmprune.checkpoint.packed_entry import BITS, entry_of
from llmprune.checkpoint.packed_tensor import Layout, pack, widened
from llmprune.checkpoint.reader import TensorInfo
from llmprune.contracts import VALUES
from llmprune.kernels.packing import full_mask


class Packing:
    """Packs the tensors that a run writes.

    Args:
        layouts: of the tensors that may be packed, by name.
        bits: of a value.

    Raises:
        ValueError: there are no packed values of so many bits; or values of several dtypes are to be rounded,
            which the format cannot tell apart.
    """

    def __init__(self, layouts: Mapping[str, Layout], bits: int = 16) -> None:
        dtypes = sorted({str(layout.dtype).removeprefix("torch.") for layout in layouts.values()})
        if bits != 16 and len(dtypes) > 1:
            raise ValueError(
                f"the matrices are of several dtypes ({', '.join(dtypes)}), and rounded values become one; "
                "use --values same"
            )
        if bits not in BITS:
            raise ValueError(f"packed values have 8 or 4 bits, got {bits}; write the rounded weights dense")
        self.layouts = {name: replace(layout, bits=bits) for name, layout in layouts.items()}
        self._bits = bits

    @property
    def values(self) -> str:
        """How the values are packed, see `VALUES`."""
        return next(name for name, bits in VALUES.items() if bits == self._bits)

    def parts(
        self,
        tensors: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        scales: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> dict[str, Tensor]:
        """What is stored of some tensors: those that become smaller are packed, the others stay as they are.

        Args:
            tensors: dense, by name.
            masks: the bits of their matrices as `masks.safetensors` has them; of a stack by `NAME.NUMBER`.
            scales: those that the matrices were rounded with, bfloat16 [R, ceil(C / 128)], named likewise;
                others are rounded here.
        """
        stored: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            layout = self.layouts.get(name)
            mask = _mask_of(name, layout, masks) if layout is not None else None
            if layout is None or mask is None:
                stored[name] = tensor
                continue
            if layout.bytes(mask) < tensor.nbytes:
                given = _scales_of(name, layout, scales)
                stored |= {name + part: t for part, t in pack(tensor, mask, layout, given).items()}
            else:
                stored[name] = tensor
        return stored

    def entry(self, headers: Mapping[str, TensorInfo | Any], load: Callable[[str], Tensor]) -> dict[str, Any]:
        """What config.json says of what was written; see `entry_of`.

        Args:
            headers: every tensor that was written, by name. load: reads one.
        """
        found = {name: layout.found(name, headers) for name, layout in self.layouts.items()}
        packed = {name: layout for name, layout in found.items() if layout is not None}
        kept = {
            name: layout.rows * layout.columns if layout.whole else int(load(f"{name}_rows")[-1])
            for name, layout in packed.items()
        }
        # Also of those that stay dense, whose masks are read from their weights.
        transposed = sorted(name for name, layout in self.layouts.items() if layout.transposed)
        return entry_of(packed, kept, self._bits) | ({"transposed": transposed} if transposed else {})


def _mask_of(name: str, layout: Layout, masks: Mapping[str, Tensor]) -> Tensor | None:
    """The mask of a tensor, uint8 [R, 8 ceil(C / 64)]; None where it stays dense.

    That is where none of its matrices is pruned, or one is not and would be rounded with the others.
    """
    if not layout.stacked:
        return widened(masks[name], layout.columns) if name in masks else None
    parts = [masks.get(f"{name}.{number}") for number in range(layout.stacked)]
    absent = [part is None for part in parts]
    if all(absent) or (any(absent) and layout.bits != 16):
        return None
    whole = full_mask(layout.rows // layout.stacked, layout.columns)
    return torch.cat([whole if part is None else widened(part, layout.columns) for part in parts])


def _scales_of(name: str, layout: Layout, scales: Mapping[str, Tensor]) -> Tensor | None:
    """The scales of a tensor among those given, [R, ceil(C / 128)]; None where there are none."""
    if layout.bits == 16 or not scales:
        return None
    if not layout.stacked:
        return scales.get(name)
    return torch.cat([scales[f"{name}.{number}"] for number in range(layout.stacked)])
