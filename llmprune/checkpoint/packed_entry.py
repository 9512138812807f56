"""What config.json says of a packed checkpoint: its `quantization_config`, written, read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from llmprune.checkpoint.packed_tensor import PACKED_DTYPES, PARTS, Layout
from llmprune.checkpoint.reader import TensorInfo
from llmprune.common.messages import shown
from llmprune.contracts import VALUES
from llmprune.kernels import layout as bits_and_rows
from llmprune.kernels.layout import GROUP

METHOD = "llmprune"  # quant_method in config.json: other loaders refuse it
VERSION = 1
BITS = tuple(VALUES.values())


def packing_entry(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a config says of a packed checkpoint; None for any other."""
    entry = config.get("quantization_config")
    return entry if isinstance(entry, dict) and entry.get("quant_method") == METHOD else None


def entry_of(layouts: Mapping[str, Layout], kept: Mapping[str, int], bits: int) -> dict[str, Any]:
    """What config.json says of a packed folder, by tensor: its rows, columns and kept values."""
    transposed = sorted(name for name, layout in layouts.items() if layout.transposed)
    stacks = {name: layout.stacked for name, layout in layouts.items() if layout.stacked}
    dtypes = {str(layout.dtype).removeprefix("torch.") for layout in layouts.values()}
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "bits": bits,
        "group": GROUP,
        "matrices": {n: [layout.rows, layout.columns, kept[n]] for n, layout in sorted(layouts.items())},
        **({"transposed": transposed} if transposed else {}),
        **({"stacks": dict(sorted(stacks.items()))} if stacks else {}),
        **({"dtype": min(dtypes)} if bits != 16 and layouts else {}),
    }


def layouts_of(entry: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, Layout]:
    """The packed tensors of a checkpoint with this entry in its config, each checked against the headers."""
    if entry.get("version") != VERSION:
        raise ValueError(
            f"the packed checkpoint is of version {shown(entry.get('version'))}, and this llmprune reads "
            f"version {VERSION}; update llmprune"
        )
    try:
        bits, group, matrices = entry["bits"], entry["group"], dict(entry["matrices"])
        transposed, stacks = frozenset(entry.get("transposed", ())), dict(entry.get("stacks", {}))
        whole = [*matrices.values(), *((count,) for count in stacks.values())]
        numbers = [number for sizes in whole for number in sizes]
        if bits not in BITS or group != GROUP or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError("sizes")
        dense = getattr(torch, entry["dtype"]) if bits != 16 else None
        if dense is not None and dense not in PACKED_DTYPES:
            raise ValueError("dtype")
        sizes = {str(name): (int(r), int(c), int(n)) for name, (r, c, n) in matrices.items()}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"quantization_config of the packed checkpoint is damaged ({shown(error)}); restore config.json"
        ) from None
    found = {}
    for name, (rows, columns, kept) in sizes.items():
        values = tensors.get(name)
        layout = Layout(
            rows,
            columns,
            dense or (values.dtype if values is not None and values.dtype else torch.bfloat16),
            int(stacks.get(name, 0)),
            name in transposed,
            bits,
        )
        if bits != 16 and kept == rows * columns and name + "_rows" not in tensors:
            layout = layout.found(name, tensors) or layout
        _check_header(name, layout, kept, tensors)
        found[name] = layout
    _check_listed(found, tensors)
    return found


def _check_header(name: str, layout: Layout, kept: int, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise `ValueError` where the headers have other shapes than the config says."""
    rows, groups = layout.rows, -(-layout.columns // GROUP)
    entries = rows * bits_and_rows.row_entries(layout.columns, layout.bits) if layout.whole else kept
    wanted: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
        "": ((entries,), {16: ("F32", "F16", "BF16"), 8: ("I8",), 4: ("U8",)}[layout.bits]),
        "_mask": ((rows, 8 * layout.words), ("U8",)),
        "_rows": ((rows + 1,), ("I32", "I64")),
        "_scale": ((rows, groups), ("BF16",)),
    }
    if rows < 1 or layout.columns < 1 or (layout.stacked and rows % layout.stacked):
        raise ValueError(
            f"the packed tensor {shown(name)} has {rows} rows of {layout.columns}; it is damaged"
        )
    for part, (shape, stored) in ((part, wanted[part]) for part in layout.parts):
        tensor = tensors.get(name + part)
        # Values of 4 bits begin anew with every mask word: how many bytes they take follows from the mask.
        some = part == "" and layout.bits == 4 and not layout.whole
        fits = tensor is not None and (len(tensor.shape) == 1 if some else tensor.shape == shape)
        if tensor is not None and tensor.stored in stored and fits:
            continue
        have = "nothing" if tensor is None else f"{tensor.stored} {list(tensor.shape)}"
        raise ValueError(
            f"config.json asks for {stored[0]} {'[bytes]' if some else list(shape)} in {shown(name + part)}, "
            f"and the files hold {have}; the packed checkpoint is damaged"
        )


def _check_listed(layouts: Mapping[str, Layout], tensors: Mapping[str, TensorInfo]) -> None:
    """Raise `ValueError` where the files hold a packed tensor that config.json does not name."""
    for name, tensor in tensors.items():
        parts = any(name + part in tensors for part in PARTS[1:])
        if parts and len(tensor.shape) == 1 and name not in layouts:
            raise ValueError(
                f"{shown(name)} lies packed in the files, and config.json does not name it in matrices; "
                "the packed checkpoint is damaged"
            )
