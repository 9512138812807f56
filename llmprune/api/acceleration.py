"""The Python function `accelerate`: what is faster on an NVIDIA GPU than dense products, where it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from llmprune.api.arguments import checked
from llmprune.common.messages import shown
from llmprune.machine import device as devices

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = (1, 16, 256, 4096)


def _in_memory(name: str, value: Any) -> Any:
    if not isinstance(value, torch.nn.Module):
        raise ValueError(
            f"{name} must be a transformers model in memory, got {shown(value)}; llmprune.load makes one"
        )
    return value


@checked(model=_in_memory)
def accelerate(
    model: PreTrainedModel, *, rows: int | Sequence[int] = ROWS, report: Callable[[str], None] | None = print
) -> dict[str, Any]:
    """Make the linear layers of a model on an NVIDIA GPU faster where sparsity allows it, in place.

    Each layer is measured on the GPU with real products, beside its dense product, at every row count, and
    changed only where something wins and its result is the dense one's up to rounding. A dense layer whose
    weight holds 2:4 gets torch's semi-structured tensor: in place of its weight where that wins at every row
    count, else beside it. A packed layer gets the fastest kernel. All others are left and named.

    Args:
        model: a transformers model on the GPU, dense (with 2:4 zeros) or packed.
        rows: numbers of rows of inputs (sequences times tokens) that matter. What is measured at one holds up
            to it, from the next lower one on; what is measured at the largest holds above it too.
        report: gets a line for each layer; None for nowhere.

    Returns:
        A dict with `device`, `rows`, `changed` (how many layers) and `layers`: of each `name`, `shape`,
        `kind` (`2:4` or `packed`), `ratios` (seconds of the dense product by those of the fastest other, by
        rows), `ways` (what is taken, by rows), `left` (why nothing was changed) and `refused` (what did not
        work, each with the reason).

    Raises:
        ValueError: the model is not on an NVIDIA GPU.
    """
    from llmprune.runtime.accelerate import measured

    tensors = [*model.parameters(), *model.buffers()]
    on = next((tensor for tensor in tensors if devices.on_nvidia(tensor)), None)
    if on is None:
        where = tensors[0].device if tensors else "no device"
        raise ValueError(
            f"accelerate measures on an NVIDIA GPU, and the model is on {where}; "
            "move it with model.to('cuda')"
        )
    layers = []
    for layer in measured(model, rows):  # type: ignore[arg-type]  # made a tuple by the check
        if report is not None:
            report(layer.line())
        layers.append(layer)
    return {
        "device": devices.describe(on.device),
        "rows": list(rows),  # type: ignore[arg-type]
        "changed": sum(not layer.left for layer in layers),
        "layers": [dataclasses.asdict(layer) for layer in layers],
    }
