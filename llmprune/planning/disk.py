"""What the output of a run takes on disk, dense or packed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from llmprune.checkpoint.packed_tensor import Layout
from llmprune.checkpoint.packing import Packing
from llmprune.model.opening import Model
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
    sparsities = {name: matrix.sparsity for name, matrix in plan.matrices.items()}
    remarks = _staying_dense(model, sparsities, layouts)
    disk = plan.disk + predict_disk(model, sparsities, layouts)
    return replace(plan, disk=disk, remarks=plan.remarks + remarks)


def predict_disk(model: Model, sparsities: Mapping[str, float], layouts: Mapping[str, Layout] = {}) -> int:
    """Bytes of an output: its weights, a bit per entry of its masks, copied files, record and report.

    Args:
        sparsities: of the matrices that are pruned, by name.
        layouts: of the tensors that may be packed; a packed output needs no masks beside it.
    """
    packed = _packed_bytes(model, sparsities, layouts)
    weights = sum(packed.get(name, t.bytes) for name, t in model.source.tensors.items())
    shapes = [target.shape for target in all_targets(model.skeleton) if target.name in sparsities]
    masks = 0 if layouts else sum(rows * -(-columns // 8) for rows, columns in shapes)
    copied = 0 if model.files is None else sum(len(model.files.read(n)) for n in model.files.companions(True))
    return weights + masks + copied + record_bytes(len(shapes))


def record_bytes(matrices: int) -> int:
    """Bytes of record, report, plots and card of a run that prunes so many matrices."""
    return _RECORD + _ENTRY * matrices


def _packed_bytes(
    model: Model, sparsities: Mapping[str, float], layouts: Mapping[str, Layout]
) -> dict[str, int]:
    """Bytes of the tensors that become smaller when they are packed, by name."""
    kept: dict[str, int] = {}
    for target in all_targets(model.skeleton):
        weights = target.shape[0] * target.shape[1]
        left = weights - round(sparsities.get(target.name, 0.0) * weights)
        kept[target.tensor] = kept.get(target.tensor, 0) + left
    sizes = {name: layout.bytes_of(kept[name], (kept[name] + 1) // 2) for name, layout in layouts.items()}
    return {name: size for name, size in sizes.items() if size < model.source.tensors[name].bytes}


def _staying_dense(
    model: Model, sparsities: Mapping[str, float], layouts: Mapping[str, Layout]
) -> tuple[str, ...]:
    """A line where packing would not make some of the pruned matrices smaller; none where it makes all so."""
    packed = _packed_bytes(model, sparsities, layouts)
    pruned = [target.tensor for target in all_targets(model.skeleton) if target.name in sparsities]
    count = sum(name in layouts and name not in packed for name in pruned)
    of = len(pruned)
    return (f"{count} of {of} pruned matrices stay dense: packed they would not be smaller",) if count else ()
