"""Packed layers of one parent that are given the same input (q, k and v; gate and up) share one product.

Which ones they are is seen while the model works, so names do not matter: where a layer was called with the
very tensor that its sibling had been called with, the sibling computes for both the next time, and the result
waits for the one call that wants it. A result that nobody has asked for ends that for good.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from llmprune.kernels.layout import Packed
from llmprune.kernels.products import MOST_MATRICES, Prepared, alike


class Layer(Protocol):
    """What is asked of a packed layer; `PackedLinear` is one."""

    def packed(self) -> Packed:
        """Its matrix."""

    def prepared(self) -> Prepared:
        """The same, ready for few rows of inputs."""

    def product(self, x: Tensor) -> Tensor:
        """y [..., R] of x [..., C], without a bias."""


@dataclass
class _Held:
    """Products of `x`, as it was, with the matrices of layers that have not been called yet."""

    leader: Layer
    x: Tensor
    version: int
    ys: dict[Layer, Tensor]


class Together:
    """The packed layers of one parent; each is called through `product`."""

    def __init__(self) -> None:
        self._followers: dict[Layer, tuple[Layer, ...]] = {}
        self._apart: set[tuple[Layer, Layer]] = set()  # leaders and layers whose product was not wanted
        self._held: _Held | None = None
        self._last: tuple[Layer, Any, int] | None = None
        self._prepared: dict[Layer, Prepared] = {}

    def __reduce__(self) -> Any:
        return Together, ()  # a copy has its own layers, and learns anew

    def product(self, layer: Layer, x: Tensor) -> Tensor:
        """y [..., R] of x [..., C], without a bias."""
        # Tensors of inference mode do not count their changes, so nobody could tell whether x is the same.
        if torch.compiler.is_compiling() or type(x) is not Tensor or not x.is_cpu or x.is_inference():
            return layer.product(x)
        y = self._waiting(layer, x)
        if y is not None:
            return y
        followers = self._followers.get(layer)
        if not followers:
            self._learn(layer, x)
            return layer.product(x)
        prepared = self._of(layer, followers)
        if not prepared.takes(x):
            return layer.product(x)
        y, *others = prepared(x)
        ys = dict(zip(followers, others, strict=True))
        self._held = _Held(layer, x, x._version, ys)
        return y

    def _waiting(self, layer: Layer, x: Tensor) -> Tensor | None:
        """What was computed for this very call."""
        held = self._held
        if held is None:
            return None
        if held.x is x and held.version == x._version:
            y = held.ys.pop(layer, None)
            if not held.ys:
                self._held = None
            return y
        if layer is held.leader or layer in held.ys:  # its turn has come again, with another input
            self._held, unwanted = None, list(held.ys)
            self._apart |= {(held.leader, other) for other in unwanted}
            left = (f for f in self._followers.get(held.leader, ()) if f not in unwanted)
            self._followers[held.leader] = tuple(left)
        return None

    def _learn(self, layer: Layer, x: Tensor) -> None:
        """Note who is called with the same tensor."""
        last, version = self._last, x._version
        if last is None or last[0] is layer or last[1]() is not x or last[2] != version:
            self._last = layer, weakref.ref(x), version
            return
        leader, known = last[0], self._followers.get(last[0], ())
        room = len(known) + 1 < MOST_MATRICES and layer not in known and (leader, layer) not in self._apart
        if room and alike(leader.packed(), layer.packed()):
            self._followers[leader] = (*known, layer)

    def _of(self, leader: Layer, followers: tuple[Layer, ...]) -> Prepared:
        """Their matrices, ready for one product; made anew when one of them has changed."""
        each = [layer.prepared().matrices[0] for layer in (leader, *followers)]
        made = self._prepared.get(leader)
        known = [] if made is None else made.matrices
        if made is None or [id(one) for one in known] != [id(one) for one in each]:
            made = self._prepared[leader] = Prepared(each)
        return made
