"""The mean squares of the inputs of some layers, over whole forward passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


def input_squares(layers: Mapping[str, nn.Module], forward: Callable[[], Any]) -> dict[str, Tensor]:
    """The mean square of each input feature of the layers, float32 [C], by their names.

    Args:
        layers: by name.
        forward: runs them, as often as it likes; every token that a layer sees counts.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].detach().float().flatten(0, -2)
            squares = rows.square().sum(0)
            sums[name] = sums[name] + squares if name in sums else squares
            counts[name] = counts.get(name, 0) + len(rows)

        return note

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / counts[name] for name, total in sums.items()}
