"""Matrices, and whole folders, in the sparse formats of compressed-tensors, made as slowly as possible."""

from __future__ import annotations

import json

import numpy as np
import torch
from damage import ONE_FILE
from safetensors.torch import load_file, save_file


def sparse(*shape, dtype=torch.float32, seed=0):
    """A matrix with about two thirds of zeros, one of them -0.0, an empty row and a full one."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    weight[torch.rand(shape, generator=generator) < 0.66] = 0
    if len(shape) == 2 and shape[0] > 2:
        weight[1], weight[2] = 0, 1.5
        weight[1, 0] = -0.0
    return (weight * 3).to(dtype)


def two_of_four(rows, columns, dtype=torch.float32):
    weight = sparse(rows, columns) + 1
    keep = torch.zeros(rows, columns // 4, 4)
    order = torch.rand(keep.shape, generator=torch.Generator().manual_seed(1)).argsort(dim=-1)
    keep.scatter_(2, order[..., :2], 1.0)
    return (weight * keep.reshape(rows, columns)).to(dtype), keep.reshape(rows, columns).bool()


def bits_of(keep):
    """The bits of a mask [..., C], counted out one by one."""
    found = torch.zeros(*keep.shape[:-1], -(-keep.shape[-1] // 8), dtype=torch.uint8)
    for place in np.ndindex(*keep.shape):
        if keep[place]:
            found[(*place[:-1], place[-1] // 8)] += 1 << place[-1] % 8
    return found


def values_of(weight, keep):
    found = [weight[place] for place in np.ndindex(*keep.shape) if keep[place]]
    return torch.stack(found) if found else weight.new_zeros(0)


def packed(name, weight, keep, **more):
    """A matrix in the format sparse-bitmask, as slowly as possible."""
    counts = keep.sum(dim=-1)
    return {
        f"{name}.shape": torch.tensor(weight.shape),
        f"{name}.compressed": values_of(weight, keep),
        f"{name}.bitmask": bits_of(keep),
        f"{name}.row_offsets": counts.cumsum(0) - counts,
        **{f"{name}.{part}": tensor for part, tensor in more.items()},
    }


def compressed(folder, output, form, kind=None, key="quantization_config"):
    """A dense folder of one file as compressed-tensors would have written it.

    `form`: sparse-bitmask or sparse-24-bitmask. `kind`: of quantised values, None for plain ones. `key`: of
    config.json. Returns what its tensors are when they are dense.
    """
    generator = torch.Generator().manual_seed(5)
    stored, dense = {}, {}
    for name, tensor in sorted(load_file(folder / ONE_FILE).items()):
        if "_proj" not in name:
            stored[name] = dense[name] = tensor
            continue
        rows, columns = tensor.shape
        stem = name.removesuffix(".weight")
        keep = torch.rand(tensor.shape, generator=generator) < 0.3
        if form == "sparse-24-bitmask":
            order = torch.rand(rows, columns // 4, 4, generator=generator).argsort(dim=-1)
            keep = torch.zeros(order.shape).scatter_(2, order[..., :2], 1.0).reshape(rows, columns).bool()
        values, more = tensor, {}
        if kind is not None:
            scales = (torch.rand(rows, 1, generator=generator) + 0.5).to(torch.bfloat16) / 100
            values = (tensor * 900).clamp(-100, 100)
            values, more = torch.where(values.abs() < 1, 1.0, values).to(kind), {"weight_scale": scales}
        parts = packed(stem, values.float(), keep, **more)
        parts[f"{stem}.compressed"] = parts[f"{stem}.compressed"].to(values.dtype)
        dense[name] = torch.zeros(tensor.shape, dtype=tensor.dtype if kind is None else torch.bfloat16)
        for r, c in np.argwhere(keep.numpy()):
            dense[name][r, c] = values[r, c].to(dense[name].dtype) * (scales[r, 0] if kind is not None else 1)
        if form == "sparse-24-bitmask":
            parts[f"{stem}.compressed"] = parts[f"{stem}.compressed"].reshape(rows, columns // 2)
            parts[f"{stem}.shape"] = torch.tensor([[rows], [columns]])
            del parts[f"{stem}.row_offsets"]
        stored |= parts
    output.mkdir()
    save_file({n: t.contiguous() for n, t in stored.items()}, output / ONE_FILE, metadata={"format": "pt"})
    entry = {"format": form, "targets": ["Linear"], "ignore": ["lm_head"], "global_sparsity": 0.5}
    whole = {"quant_method": "compressed-tensors", "format": "dense", "sparsity_config": entry}
    values = json.loads((folder / "config.json").read_text())
    values[key] = entry if key == "sparsity_config" else whole
    (output / "config.json").write_text(json.dumps(values))
    for file in folder.glob("tokenizer*"):
        (output / file.name).write_bytes(file.read_bytes())
    return dense
