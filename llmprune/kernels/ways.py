"""How a GPU multiplies with a packed matrix: the ways, and which one is taken for how many rows of x.

`torch` and `triton` unpack blocks of dense rows and multiply with them: that saves memory. `fused` unpacks in
registers, for few rows of x: that may save time too, which only a measurement on the GPU at hand can tell.
n rows of x, R outputs, C inputs.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmprune.kernels.layout import Packed
from llmprune.kernels.products import by_blocks, packed_linear

MOST_FUSED = 16  # rows of x
_OF_16_BITS = (torch.bfloat16, torch.float16)

_operators = torch.library.Library("llmprune", "FRAGMENT")
_operators.define(
    "packed_linear_triton(Tensor x, Tensor values, Tensor mask, Tensor rows, Tensor? scale, int columns,"
    " int bits, Tensor starts, Tensor bases, int[] shape) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


class Way(NamedTuple):
    """One way: `torch`, `triton` or `fused`; of `fused` the outputs of a program and its warps."""

    kind: str
    shape: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """For people."""
        return " ".join((self.kind, "x".join(map(str, self.shape)))).strip()


TORCH, TRITON = Way("torch"), Way("triton")
SHAPES = ((4, 4), (8, 4), (16, 4), (16, 8))  # outputs of a program, and its warps
_FUSED = tuple(Way("fused", shape) for shape in SHAPES)


def candidates(packed: Packed, n: int, dtype: torch.dtype) -> tuple[Way, ...]:
    """The ways there are for n rows of x of a dtype, whether or not they are fast."""
    if importlib.util.find_spec("triton") is None:
        return (TORCH,)
    same = packed.scale is not None or packed.values.dtype == dtype
    if n > MOST_FUSED or dtype not in _OF_16_BITS or not same:
        return TORCH, TRITON
    # Matrix instructions, for several rows of x, take 16 outputs at least.
    return TORCH, TRITON, *(way for way in _FUSED if n == 1 or way.shape[0] >= 16)


@dataclass(frozen=True)
class Plan:
    """Which way a matrix goes, by the number of rows of x.

    Attributes:
        starts, bases: of `gpu.prepared`.
        steps: a number of rows and the way for at most so many, in ascending order.
    """

    starts: Tensor
    bases: Tensor
    steps: tuple[tuple[int, Way], ...]

    def product(self, x: Tensor, packed: Packed) -> Tensor:
        """y [..., R] of x [..., C], by the way chosen for its number of rows."""
        n = x.numel() // packed.columns
        way = pick(self.steps, n)
        return multiply(
            x, packed, (self.starts, self.bases), TORCH if way.kind == "fused" and n > MOST_FUSED else way
        )


def pick(steps: Sequence[tuple[int, Any]], n: int) -> Any:
    """What belongs to the first number that is n or more; above all of them, what belongs to the last."""
    return next((what for most, what in steps if n <= most), steps[-1][1])


def multiply(x: Tensor, packed: Packed, beside: tuple[Tensor, Tensor], way: Way) -> Tensor:
    """y [..., R] of x [..., C] in one way; `beside` is what `gpu.prepared` gives."""
    if way == TORCH or not x.numel():
        return packed_linear(x, *packed)
    result: Tensor = torch.ops.llmprune.packed_linear_triton(x, *packed, *beside, way.shape)
    return result


@torch.library.impl(_operators, "packed_linear_triton", "CUDA")
def _packed_linear_triton(x: Tensor, *rest: Any) -> Tensor:
    packed, (starts, bases, shape) = Packed(*rest[:6]), rest[6:]
    y = by_triton(x.reshape(-1, packed.columns).contiguous(), packed, (starts, bases), shape)
    return y.view(*x.shape[:-1], y.shape[1])


def by_triton(x: Tensor, packed: Packed, beside: tuple[Tensor, Tensor], shape: Sequence[int]) -> Tensor:
    """y [n, R] of x [n, C], contiguous, by the kernels in `decode`: the fused one where it has a shape."""
    from llmprune.kernels import decode

    if shape:
        return decode.product(x, packed, beside, (shape[0], shape[1]))
    return by_blocks(x, packed, functools.partial(decode.expand_rows, beside))


def _shape(x: Tensor, values: Tensor, mask: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], mask.shape[0]))


torch.library.register_fake("llmprune::packed_linear_triton", _shape, lib=_operators)
