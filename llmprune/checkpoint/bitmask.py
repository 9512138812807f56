"""Reads and writes the sparse formats of compressed-tensors: `sparse-bitmask` and `sparse-24-bitmask`.

Of a matrix P the file holds the kept values and a bit per weight, which says where they are:

- `P.shape`: its dense shape, int64 [n] or [n, 1].
- `P.compressed`: the kept values row by row, [values], or [R, C / 2] of a 2:4 matrix. Of quantised matrices
  they are integers or 8-bit floats, and `P.weight_scale` stands beside them.
- `P.bitmask`: uint8 [R, ceil(C / 8)], bit j % 8 (the least significant first) of byte j // 8 for column j.
- `P.row_offsets`: where the values of each row begin, int64 [R]. Not there for 2:4 matrices.

The weight is called `P.weight`. R rows, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmprune.checkpoint.dequantised import scale_steps
from llmprune.checkpoint.files import DTYPES, NAMES
from llmprune.checkpoint.masks import pack
from llmprune.checkpoint.reader import Checkpoint, TensorInfo
from llmprune.common.messages import shown
from llmprune.numerics.counts import all_finite

FORMATS = ("sparse-bitmask", "sparse-24-bitmask")
SHAPE, BITS, WEIGHT = ".shape", ".bitmask", ".weight"
_PARTS = (SHAPE, ".compressed", BITS, ".row_offsets")
_SCALE, _ZERO = ".weight_scale", ".weight_zero_point"
# What stands beside a quantised matrix and is nothing of a dense model.
_BESIDE = (
    _SCALE,
    _ZERO,
    ".input_scale",
    ".input_zero_point",
    ".output_scale",
    ".output_zero_point",
)
_CODES = ("I8", "F8_E4M3", "F8_E5M2")
_FLOATS = ("F64", "F32", "F16", "BF16")
_OFFSETS = ("I64", "I32")


class Bitmasked:
    """A weight source that has the matrices of a compressed checkpoint dense.

    Quantised matrices have the dtype of their scales, as compressed-tensors makes them.

    Raises:
        ValueError: nothing is compressed; a part of a matrix is missing, or does not fit the others.
    """

    def __init__(self, source: Checkpoint) -> None:
        self.source = source
        tensors = source.tensors
        self._compressed = {
            name.removesuffix(part) for name in tensors for part in _PARTS[1:3] if name.endswith(part)
        }
        if not self._compressed:
            raise ValueError(
                f"{source.folder} has no matrix in {' or '.join(FORMATS)}, so there is nothing to unpack"
            )
        # Matrices that were quantised, but not compressed.
        self._quantised = {
            name.removesuffix(WEIGHT)
            for name, tensor in tensors.items()
            if name.endswith(WEIGHT)
            and tensor.stored in _CODES
            and name.removesuffix(WEIGHT) + _SCALE in tensors
        }
        whole = {name: self._info(name) for name in sorted(self._compressed | self._quantised)}
        self.tensors: dict[str, TensorInfo] = {}
        for name, tensor in tensors.items():
            stem, part = _split(name)
            if stem not in whole:
                self.tensors[name] = tensor
            elif stem + WEIGHT not in self.tensors:
                self.tensors[stem + WEIGHT] = whole[stem]
            if stem in self._compressed and part == WEIGHT:
                raise ValueError(f"{shown(name)} stands there both compressed and dense; {_DAMAGED}")

    @property
    def files(self) -> frozenset[str]:
        """The names of the weight files."""
        return self.source.files

    def check(self) -> None:
        """Raise `ValueError` if a weight file has changed."""
        self.source.check()

    def load(self, name: str) -> Tensor:
        """One tensor on the CPU, dense."""
        stem = name.removesuffix(WEIGHT) if name.endswith(WEIGHT) else ""
        if stem in self._compressed:
            values = self._scattered(stem)
            return values if self._kind(stem) in _FLOATS else self._dequantised(stem, values)
        if stem in self._quantised:
            return self._dequantised(stem, self.source.load(name))
        return self.source.load(name)

    def _kind(self, stem: str) -> str:
        """The type in which the values of a matrix are stored."""
        return self.source.tensors[stem + (_PARTS[1] if stem in self._compressed else WEIGHT)].stored

    def _info(self, stem: str) -> TensorInfo:
        """What a matrix is when it is dense; its parts are checked as far as their shapes tell."""
        tensors = self.source.tensors
        shape = self._shape(stem) if stem in self._compressed else tensors[stem + WEIGHT].shape
        kind = self._kind(stem)
        if kind in _CODES:
            dtype = self._check_scales(stem, shape)
        elif kind not in _FLOATS or stem + _SCALE in tensors:
            beside = f" beside {shown(stem + _SCALE)}" if stem + _SCALE in tensors else ""
            raise ValueError(
                f"{shown(stem + _PARTS[1])} is stored in {kind}{beside}, which is no value of "
                f"{' or '.join(FORMATS)} that is known here"
            )
        else:
            dtype = DTYPES[kind]
        return TensorInfo(shape, dtype, math.prod(shape) * dtype.itemsize, NAMES[dtype])

    def _shape(self, stem: str) -> tuple[int, ...]:
        """The dense shape of a compressed matrix."""
        tensors = self.source.tensors
        for part in _PARTS[:3]:
            if stem + part not in tensors:
                raise ValueError(f"{shown(stem + part)} is not there; {_DAMAGED}")
        stored, values, bits = (tensors[stem + part] for part in _PARTS[:3])
        listed = stored.stored in _OFFSETS and 0 < stored.elements <= 8 and len(stored.shape) <= 2
        shape = tuple(self.source.load(stem + _PARTS[0]).flatten().tolist()) if listed else ()
        if not shape or min(shape) < 1 or bits.shape != (*shape[:-1], -(-shape[-1] // 8)):
            told = list(shape) if listed else f"{stored.stored} {list(stored.shape)}"
            raise _misfit(stem, f"its shape is {told} and its bitmask {list(bits.shape)}")
        if bits.stored != "U8":
            raise _misfit(stem, f"its bitmask is stored in {bits.stored}")
        pairs = len(values.shape) == 2 and values.shape == (math.prod(shape[:-1]), shape[-1] // 2)
        if not (len(values.shape) == 1 or (pairs and math.prod(shape) % 4 == 0)):
            raise _misfit(stem, f"its shape is {list(shape)} and its values {list(values.shape)}")
        return shape

    def _check_scales(self, stem: str, shape: tuple[int, ...]) -> torch.dtype:
        """The dtype of the scales of a quantised matrix."""
        scales, zero = (self.source.tensors.get(stem + part) for part in (_SCALE, _ZERO))
        if scales is None:
            raise ValueError(f"{shown(stem + _SCALE)} is not there, and the values are quantised; {_DAMAGED}")
        if stem + ".weight_g_idx" in self.source.tensors:
            raise ValueError(
                f"{shown(stem)} is quantised with its columns reordered (weight_g_idx), which cannot be "
                "undone here"
            )
        if scales.dtype is None or len(shape) != 2 or scale_steps(shape, scales.shape) is None:
            raise _misfit(
                stem, f"its shape is {list(shape)} and its scales {scales.stored} {list(scales.shape)}"
            )
        if zero is not None and (zero.shape != scales.shape or zero.stored not in _CODES):
            raise _misfit(stem, f"its zero points are {zero.stored} {list(zero.shape)}")
        return scales.dtype

    def _scattered(self, stem: str) -> Tensor:
        """The values of a compressed matrix at their places, zeros elsewhere."""
        shape = self._shape(stem)
        values, bits = (self.source.load(stem + part) for part in _PARTS[1:3])
        keep = np.unpackbits(bits.numpy(), axis=-1, bitorder="little")
        if keep[..., shape[-1] :].any():
            raise _misfit(stem, f"its bitmask has bits beyond column {shape[-1]}")
        keep = keep[..., : shape[-1]].astype(bool)
        if np.count_nonzero(keep) != values.numel():
            raise _misfit(
                stem, f"its bitmask keeps {np.count_nonzero(keep):,} weights and {values.numel():,} are there"
            )
        if values.ndim == 2:
            if (np.count_nonzero(keep.reshape(-1, 4), axis=1) != 2).any():
                raise _misfit(stem, "its bitmask does not keep two of every four weights")
        elif len(shape) == 2:
            self._check_offsets(stem, keep)
        dense = torch.zeros(shape, dtype=values.dtype)
        whole = _WHOLE[values.dtype.itemsize]  # torch cannot place 8-bit floats by a mask
        dense.view(whole)[torch.from_numpy(keep)] = values.flatten().view(whole)
        return dense

    def _check_offsets(self, stem: str, keep: np.ndarray) -> None:
        """The offsets are not needed: of an undamaged matrix they say the same as the bits."""
        name = stem + _PARTS[3]
        if name not in self.source.tensors:
            return
        wanted = np.cumsum(np.count_nonzero(keep, axis=1))
        wanted = np.concatenate([[0], wanted[:-1]])
        whole = self.source.tensors[name].stored in _OFFSETS
        if not whole or not np.array_equal(self.source.load(name).numpy(), wanted):
            raise _misfit(stem, "its row_offsets are not those of its bitmask")

    def _dequantised(self, stem: str, codes: Tensor) -> Tensor:
        """The codes times their scales; what a code of zero stands for is taken off before."""
        scales = self.source.load(stem + _SCALE)
        steps = scale_steps(tuple(codes.shape), tuple(scales.shape))
        assert steps is not None  # the shapes were checked
        if not all_finite(scales):
            raise _misfit(stem, "its scales hold NaN or Inf")
        values = codes.to(scales.dtype)
        if stem + _ZERO in self.source.tensors:
            zero = self.source.load(stem + _ZERO).to(scales.dtype)
            values -= _spread(zero, steps)
        values *= _spread(scales, steps)
        if not all_finite(values):
            raise _misfit(stem, "values times scales hold NaN or Inf")
        return values


_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_DAMAGED = "the checkpoint is incomplete or damaged; download it again"


def _spread(scales: Tensor, steps: tuple[int, int]) -> Tensor:
    """Scales for every row and column; where all share one, it is left to torch to repeat it."""
    if scales.numel() == 1:
        return scales.reshape(1, 1)
    return scales.repeat_interleave(steps[0], 0).repeat_interleave(steps[1], 1)


def _split(name: str) -> tuple[str, str]:
    """The name of a matrix, and which part of it a tensor is."""
    for part in (*_PARTS, *_BESIDE, WEIGHT):
        if name.endswith(part):
            return name.removesuffix(part), part
    return name, ""


def _misfit(stem: str, why: str) -> ValueError:
    return ValueError(f"{shown(stem + WEIGHT)} cannot be unpacked: {why}; {_DAMAGED}")


def sparse_bitmask_tensors(name: str, weight: Tensor) -> dict[str, Tensor]:
    """A matrix [R, C] in the format sparse-bitmask, by names in the file.

    Zeros lose their sign, as they do in compressed-tensors.

    Args:
        name: of the weight, which ends in `.weight`: the format has no other names.
        weight: in float64, float32, float16 or bfloat16.

    Raises:
        ValueError: a name, shape or dtype that the format does not have.
    """
    if not name.endswith(WEIGHT) or weight.ndim != 2 or NAMES.get(weight.dtype) not in _FLOATS:
        raise ValueError(
            f"sparse-bitmask stores matrices whose names end in .weight, got {shown(name)}, "
            f"{weight.dtype} {list(weight.shape)}"
        )
    stem, keep = name.removesuffix(WEIGHT), weight != 0
    counts = keep.sum(dim=1)
    parts = (torch.tensor(weight.shape), weight[keep], pack(keep), counts.cumsum(0) - counts)
    return {stem + part: tensor for part, tensor in zip(_PARTS, parts, strict=True)}


def sparse_bitmask_config(names: Iterable[str], sparsity: float, structure: str = "unstructured") -> Any:
    """The value of `quantization_config` in the config.json of a checkpoint in the format sparse-bitmask.

    Args:
        names: of the compressed weights. sparsity: the share of zeros in them.
        structure: the pattern of their zeros, such as `2:4`.
    """
    return {
        "quant_method": "compressed-tensors",
        "sparsity_config": {
            "format": FORMATS[0],
            "targets": sorted(name.removesuffix(WEIGHT) for name in names),
            "ignore": [],
            "global_sparsity": sparsity,
            "sparsity_structure": structure,
        },
    }
