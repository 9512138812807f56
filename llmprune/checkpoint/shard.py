"""A finished block as a run hands it over to be written, and what may pack it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """A finished block as it is written.

    Attributes:
        tensors: its tensors as they are stored in a dense checkpoint, by name.
        masks: its packed keep masks by weight name.
        rows: its rows of the record.
        scales: of rounded weights, bfloat16 [R, ceil(C / 128)], by weight name.
        exact: float32 results that a run must have to go on, by weight name; removed when it is complete.
    """

    tensors: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    rows: list[dict[str, Any]]
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    exact: Mapping[str, Tensor] = field(default_factory=dict)


class Packer(Protocol):
    """Makes of tensors what is stored of them, in another format than the dense one."""

    def parts(
        self, tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor], scales: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What is stored of some tensors, with masks as bits and scales by the name of the matrix."""
        ...

    def entry(self, headers: Mapping[str, Any], load: Callable[[str], Tensor]) -> dict[str, Any]:
        """What config.json says of all that was written: tensors by name, and what reads one."""
        ...
