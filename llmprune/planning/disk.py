"""What the output of a run takes on disk, dense or packed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from llmprune.checkpoint.packed_tensor import Layout
from llmprune.checkpoint.packing import Packing
from llmprune.model.opening import Model
from llmprune.model.target import Target
from llmprune.model.targets import all_targets, packed_layouts
from llmprune.planning.plan import Plan

_RECORD = 400_000  # bytes of record, report, plots and card that do not depend on the model
_ENTRY = 2_000  # of them for every matrix that is pruned


def with_output(plan: Plan, model: Model, bits: int | None) -> Plan:
    """The plan with what its output takes, and a remark where packing makes some matrices no smaller.

    Args:
        bits: of the kept values of a packed output; None for a dense one.

    Raises:
        ValueError: values that cannot be packed so.
    """
    layouts = {} if bits is None else Packing(packed_layouts(model.skeleton), bits).layouts
    pruned = [target for target in all_targets(model.skeleton) if target.name in plan.matrices]
    packed = _packed_bytes(model, plan, layouts)
    large = sum(target.tensor in layouts and target.tensor not in packed for target in pruned)
    told = f"{large} of {len(pruned)} pruned matrices stay dense: packed they would not be smaller"
    disk = plan.disk + predict_disk(model, pruned, None if bits is None else packed)
    return replace(plan, disk=disk, remarks=plan.remarks + ((told,) if large else ()))


def predict_disk(model: Model, pruned: Sequence[Target], packed: Mapping[str, int] | None = None) -> int:
    """Bytes of an output: its weights, a bit per entry of its masks, copied files, record and report.

    Args:
        pruned: the matrices that have a mask.
        packed: bytes of the tensors that are packed, by name, of an output that needs no masks beside it;
            None for a dense one.
    """
    weights = sum((packed or {}).get(name, t.bytes) for name, t in model.source.tensors.items())
    shapes = [target.shape for target in pruned]
    masks = sum(rows * -(-columns // 8) for rows, columns in shapes) if packed is None else 0
    copied = 0 if model.files is None else sum(len(model.files.read(n)) for n in model.files.companions(True))
    return weights + masks + copied + record_bytes(len(shapes))


def record_bytes(matrices: int) -> int:
    """Bytes of record, report, plots and card of a run that prunes so many matrices."""
    return _RECORD + _ENTRY * matrices


def _packed_bytes(model: Model, plan: Plan, layouts: Mapping[str, Layout]) -> dict[str, int]:
    """Bytes of the tensors that become smaller when they are packed, by name."""
    kept: dict[str, int] = {}
    for target in all_targets(model.skeleton):
        weights, planned = target.shape[0] * target.shape[1], plan.matrices.get(target.name)
        left = weights - round(planned.sparsity * weights) if planned else weights
        kept[target.tensor] = kept.get(target.tensor, 0) + left
    sizes = {name: layout.bytes_of(kept[name], (kept[name] + 1) // 2) for name, layout in layouts.items()}
    return {name: size for name, size in sizes.items() if size < model.source.tensors[name].bytes}
