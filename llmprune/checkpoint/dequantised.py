"""Reads quantised checkpoints (fp8, mxfp4) as bfloat16: a tensor is dequantised when it is asked for.

A value is its code times the scale of its group. Both products are what transformers computes with
`dequantize=True`. R rows, C columns, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmprune.checkpoint.reader import Checkpoint, TensorInfo
from llmprune.common.messages import shown

METHODS = ("fp8", "mxfp4")
_TYPE, _STORED = torch.bfloat16, "BF16"
_PACKED = ("_blocks", "_scales")  # of mxfp4: codes [E, R, C / 32, 16], two of each byte, and scales
_INPUT_SCALES = ("activation_scale", "qscale_act", "input_scale")  # nothing of a dense model
# The values of the 16 codes of 4 bits: a sign, two bits of exponent, one of mantissa (OCP MX, E2M1).
_CODES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS = 127  # of a scale that is an exponent


class _Pair(NamedTuple):
    """A quantised tensor and its scales, by name in the files."""

    codes: str
    scales: str


class Dequantised:
    """A weight source that has the tensors of a quantised checkpoint in bfloat16, and no scales.

    Args:
        source: the checkpoint.
        group: rows and columns that share a scale, as its config says; None where it says nothing.

    Raises:
        ValueError: nothing is quantised; codes without scales, or scales of another shape.
    """

    def __init__(self, source: Checkpoint, group: tuple[int, int] | None = None) -> None:
        self.source, self._group = source, group
        self._pairs: dict[str, _Pair] = {}
        self.tensors: dict[str, TensorInfo] = {}
        scales = self._find_pairs()
        if not self._pairs:
            raise ValueError(
                f"{source.folder} has no tensor in fp8 or mxfp4, so there is nothing to dequantize; "
                "leave --dequantize out"
            )
        for name, tensor in source.tensors.items():
            if name in scales or name.endswith(_INPUT_SCALES):
                continue
            if name.endswith(_PACKED[0]) and name.removesuffix(_PACKED[0]) in self._pairs:
                name = name.removesuffix(_PACKED[0])
            if name in self._pairs:
                shape = self._shape(self._pairs[name])
                elements = torch.Size(shape).numel()
                tensor = TensorInfo(shape, _TYPE, elements * _TYPE.itemsize, _STORED)
            self.tensors[name] = tensor

    def _find_pairs(self) -> set[str]:
        """Find every quantised tensor with its scales; returns the names of the scales."""
        for name, tensor in self.source.tensors.items():
            if name.endswith(_PACKED[0]):
                whole = name.removesuffix(_PACKED[0])
                self._pairs[whole] = self._pair(name, [whole + _PACKED[1]])
            elif tensor.stored in ("F8_E4M3", "F8_E5M2") or self._packed(name):
                stem = name.removesuffix("weight")
                names = [f"{name}_scale_inv", f"{stem}scale", f"{stem}qscale_weight"]
                self._pairs[name] = self._pair(name, names)
        return {pair.scales for pair in self._pairs.values()}

    def _packed(self, name: str) -> bool:
        """Whether a tensor holds two codes of 4 bits in each byte."""
        return self.source.tensors[name].stored == "I8" and f"{name}_scale_inv" in self.source.tensors

    def _pair(self, codes: str, names: list[str]) -> _Pair:
        scales = next((name for name in names if name in self.source.tensors), None)
        if scales is None:
            raise ValueError(
                f"{shown(codes)} is stored in {self.source.tensors[codes].stored} and {shown(names[0])} is "
                "not there; the checkpoint is incomplete"
            )
        return _Pair(codes, scales)

    def _shape(self, pair: _Pair) -> tuple[int, ...]:
        codes, scales = (self.source.tensors[name].shape for name in pair)
        if pair.codes.endswith(_PACKED[0]):
            if len(codes) != 4 or codes[:-1] != scales:
                raise _misfit(pair, codes, scales)
            experts, rows, groups, half = codes
            return experts, 2 * groups * half, rows  # transformers has these experts as [C, R]
        shape = (*codes[:-1], 2 * codes[-1]) if self._packed(pair.codes) else codes
        if len(shape) not in (2, 3):
            raise _misfit(pair, codes, scales)
        self._steps(pair, shape)
        return shape

    def _steps(self, pair: _Pair, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        scales = self.source.tensors[pair.scales].shape
        steps = scale_steps(shape, scales, self._group)
        if steps is None:
            raise _misfit(pair, shape, scales)
        return steps

    def load(self, name: str) -> Tensor:
        """One tensor on the CPU, dequantised."""
        pair = self._pairs.get(name)
        if pair is None:
            return self.source.load(name)
        codes, scales = (self.source.load(part) for part in pair)
        shape = self.tensors[name].shape
        result = torch.empty(shape, dtype=_TYPE)
        if pair.codes.endswith(_PACKED[0]):
            for expert in range(shape[0]):  # one at a time: in float32 they take eight times the memory
                values = _values(codes[expert]) * _scales(scales[expert])[..., None]
                result[expert] = values.flatten(-2).T.to(_TYPE)
            return result
        down, across = self._steps(pair, shape)
        scales = _scales(scales)
        scales = scales if scales.ndim > 1 else scales.reshape(1, 1)
        matrices = zip(*(t if len(shape) == 3 else [t] for t in (result, codes)), strict=True)
        for number, (matrix, code) in enumerate(matrices):
            values = _values(code) if self._packed(pair.codes) else code.float()
            own = scales[number] if scales.ndim == 3 else scales
            spread = own.repeat_interleave(down, -2).repeat_interleave(across, -1)
            matrix.copy_(values.mul_(spread[: shape[-2], : shape[-1]]))
        return result

    @property
    def files(self) -> frozenset[str]:
        """The names of the weight files."""
        return self.source.files

    def check(self) -> None:
        """Raise `ValueError` if a weight file has changed."""
        self.source.check()


def scale_steps(
    shape: tuple[int, ...], scales: tuple[int, ...], group: tuple[int, int] | None = None
) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None where the scales do not fit the matrix.

    Args:
        shape: of the matrix. scales: the shape of its scales.
        group: what the config says of it.
    """
    rows, columns = scales[-2:] if len(scales) > 1 else (1, 1)
    fits = len(scales) in (0, 1, len(shape)) and torch.Size(scales).numel() > 0
    if fits and (len(scales) > 1 or torch.Size(scales).numel() == 1):
        down, across = group or (1, 1)
        if (-(-shape[-2] // down), -(-shape[-1] // across)) == (rows, columns):
            return down, across
        if shape[-2] % rows == 0 and shape[-1] % columns == 0:
            return shape[-2] // rows, shape[-1] // columns
    return None


def _values(packed: Tensor) -> Tensor:
    """The values [..., 2 n] of codes of 4 bits, two in each byte [..., n], the lower half first."""
    table = torch.tensor([*_CODES, *(-code for code in _CODES)], dtype=torch.float32)
    halves = packed.view(torch.uint8)
    return torch.stack([table[(halves & 15).int()], table[(halves >> 4).int()]], dim=-1).flatten(-2)


def _scales(stored: Tensor) -> Tensor:
    """Scales in float32; bytes are exponents of two."""
    if stored.dtype == torch.uint8:
        return torch.exp2(stored.float() - _BIAS)
    return stored.float()


def _misfit(pair: _Pair, codes: tuple[int, ...], scales: tuple[int, ...]) -> ValueError:
    return ValueError(
        f"{shown(pair.codes)} has shape {list(codes)} and its scales {list(scales)}, which do not fit; the "
        "checkpoint is damaged, or quantised in a way that cannot be undone here"
    )
