"""What the runs of a sweep share, since it depends on the dense model and the calibration rows alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from llmprune.contracts import Measure
from llmprune.model.activations import BlockInputs
from llmprune.recipe.types import Recipe

Place = tuple[int, int, int, str]  # block, first sequence and the one after the last, first matrix of a group


class DenseInputs:
    """Inputs in the dense model, kept in memory from one run to the next: of blocks, and of their matrices.

    What has no room is computed again in every run, with the same result.

    Args:
        room: bytes that may be taken.
        reserved: bytes of it that are for the inputs of blocks, which save most per byte.
    """

    def __init__(self, room: int, reserved: int) -> None:
        self._room, self._reserved = room, reserved
        self._open = True
        self._outputs: dict[int, Tensor] = {}
        self._inputs: dict[Place, tuple[str, Tensor]] = {}

    def outputs(self, block: int) -> Tensor | None:
        """The dense outputs of a block for all sequences, [N, T, D], where they are kept."""
        return self._outputs.get(block)

    def keep_outputs(self, block: int, inputs: BlockInputs) -> None:
        """Keep them: they have just become the inputs of the next block."""
        if not inputs.stateless:
            self._close()
        size = inputs.everything.nbytes
        if self._open and size <= self._room:
            self._outputs[block] = inputs.everything.clone()
            self._room -= size
            self._reserved = max(0, self._reserved - size)

    def input(self, place: Place) -> tuple[str, Tensor] | None:
        """The input of a group for some sequences, and the name of its leader; None where not kept."""
        return self._inputs.get(place)

    def keep_input(self, place: Place, inputs: Sequence[tuple[str, Tensor]]) -> None:
        """Keep what a dense pass has just collected, where that is of one group of matrices."""
        if not self._open or len(inputs) != 1:
            return
        leader, x = inputs[0]
        if x.nbytes <= self._room - self._reserved:
            self._inputs[place] = leader, x.detach().clone()
            self._room -= x.nbytes

    def _close(self) -> None:
        """Keep nothing: later blocks need more of earlier ones than the hidden states."""
        self._open, self._outputs, self._inputs = False, {}, {}


@dataclass
class Shared:
    """What runs with the same model, dtype and calibration rows have in common.

    Attributes:
        inputs: those in the dense model; None where at most one run needs them.
    """

    inputs: DenseInputs | None = None
    _measures: dict[str, dict[int, Measure]] = field(default_factory=dict)

    def measures(self, recipe: Recipe, measure: Callable[[], dict[int, Measure]]) -> dict[int, Measure]:
        """What the recipe's allocator measures of the dense model: measured once for recipes that agree."""
        decides: tuple[Any, ...] = (
            asdict(recipe.allocator),
            recipe.seed,
            asdict(recipe.experts),
            recipe.sums,
            recipe.precision,
        )
        key = repr(decides)
        if key not in self._measures:
            self._measures[key] = measure()
        return self._measures[key]
