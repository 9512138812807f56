"""Decodes packed folders, and those in bitmasks, in plain numpy, from the layouts in the documentation."""

from __future__ import annotations

import json

import numpy as np

STORED = {"F64": "<u8", "F32": "<u4", "F16": "<u2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "U8": "u1"}
STORED |= {"I8": "i1", "I16": "<i2", "BOOL": "u1", "F8_E4M3": "u1", "U16": "<u2", "U32": "<u4"}


def stored(folder):
    """Every tensor of a folder as the bits of its numbers, with its dtype's name."""
    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                start, end = (8 + length + offset for offset in entry["data_offsets"])
                numbers = np.frombuffer(data[start:end], STORED[entry["dtype"]])
                found[name] = numbers.reshape(entry["shape"]), entry["dtype"]
    return found


def decoded(folder):
    """Every tensor as it is when it is dense: the bytes of its numbers."""
    tensors = stored(folder)
    entry = json.loads((folder / "config.json").read_text())["quantization_config"]
    dense = {name: bits for name, (bits, _) in tensors.items()}
    for name, (rows, columns, _) in entry["matrices"].items():
        for part in ("_mask", "_rows", "_scale"):
            dense.pop(name + part, None)
        values = tensors[name][0]
        if f"{name}_mask" in tensors:
            keep = np.unpackbits(tensors[f"{name}_mask"][0], axis=1, bitorder="little")[:, :columns] == 1
        else:  # rounded, and every weight is kept
            keep = np.ones((rows, columns), bool)
        if entry["bits"] == 16:
            matrix = np.zeros((rows, columns), values.dtype)
            matrix[keep] = values
        else:
            codes = np.zeros((rows, columns), np.float32)
            codes[keep] = values if entry["bits"] == 8 else nibbles(values, keep)
            scale = wide(tensors[f"{name}_scale"][0])
            product = codes * np.repeat(scale, 128, axis=1)[:, :columns]
            matrix = rounded(product, entry["dtype"])
        count = entry.get("stacks", {}).get(name, 0)
        matrix = matrix.reshape(*((count,) if count else ()), -1, columns)
        dense[name] = matrix.swapaxes(-1, -2) if name in entry.get("transposed", ()) else matrix
    return {name: np.ascontiguousarray(bits) for name, bits in dense.items()}


def nibbles(values, keep):
    """The codes of the kept weights, row by row; the values of every 64 columns begin a byte."""
    codes, place = [], 0
    for row in keep:
        for first in range(0, len(row), 64):
            kept = int(row[first : first + 64].sum())
            taken = values[place : place + (kept + 1) // 2]
            codes.extend(np.stack([taken & 15, taken >> 4], axis=1).reshape(-1)[:kept].astype(np.int64) - 8)
            place += (kept + 1) // 2
    return codes


def wide(bits):
    """bfloat16 as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values, dtype):
    """The bits of float32 numbers in a dtype, rounded to the nearest, to even between two."""
    if dtype == "float32":
        return values.view(np.uint32)
    if dtype == "float16":
        return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def decoded_bitmasks(folder):
    """Every tensor of a folder of compressed-tensors as it is when it is dense; scales for rows or all."""
    tensors = stored(folder)
    dense = {}
    for name, (bits, _) in tensors.items():
        stem, _, part = name.rpartition(".")
        if f"{stem}.compressed" not in tensors:
            dense[name] = bits
        elif part == "compressed":
            dense[f"{stem}.weight"] = _matrix(tensors, stem)
    return {name: np.ascontiguousarray(bits) for name, bits in dense.items()}


def _matrix(tensors, stem):
    values, kind = tensors[f"{stem}.compressed"]
    shape = tensors[f"{stem}.shape"][0].reshape(-1)
    keep = np.unpackbits(tensors[f"{stem}.bitmask"][0], axis=-1, bitorder="little")[..., : shape[-1]] == 1
    if f"{stem}.weight_scale" not in tensors:
        matrix = np.zeros(shape, values.dtype)
        matrix[keep] = values.reshape(-1)
        return matrix
    scale, form = tensors[f"{stem}.weight_scale"]
    codes = np.zeros(shape, np.float64)
    codes[keep] = (eight(values) if kind == "F8_E4M3" else values).reshape(-1)
    if form == "BF16":
        return rounded((codes * spread(wide(scale), shape)).astype(np.float32), "bfloat16")
    real = {"F64": np.float64, "F32": np.float32, "F16": np.float16}[form]
    product = codes * spread(scale.view(real).astype(np.float64), shape)
    return product.astype(real).view(scale.dtype)


def spread(scale, shape):
    """Scales for every row and column of a matrix."""
    scale = scale.reshape(scale.shape if scale.ndim == 2 else (1, 1))
    rows, columns = (whole // own for whole, own in zip(shape, scale.shape, strict=True))
    return np.repeat(np.repeat(scale, rows, axis=0), columns, axis=1)


def eight(bits):
    """float8 e4m3fn: a sign, four bits of exponent, three of mantissa; no infinity, all ones is NaN."""
    sign = np.where(bits & 128, -1.0, 1.0)
    exponent, mantissa = (bits >> 3 & 15).astype(np.int64), (bits & 7) / 8
    number = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7))
    return np.where(bits & 127 == 127, np.nan, sign * number)
