"""Which masks of a file belong to which matrices of a model."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from llmprune.checkpoint.masks import KeepMasks
from llmprune.common.messages import shown
from llmprune.model.target import Target


class Masking:
    """The masks of a file, for the matrices of a model.

    Attributes:
        masks: the file.
        targets: the matrices that have a mask.
        dense: the names of those that have none.

    Raises:
        ValueError: a mask that belongs to no matrix, or is of another shape.
    """

    def __init__(self, masks: KeepMasks, targets: Iterable[Target], label: str) -> None:
        self.masks = masks
        known = {target.key: target for target in targets}
        path = masks.path
        strange = [name for name in masks.shapes if name not in known]
        if strange:
            raise ValueError(
                f"{path} has a mask for {shown(strange[0])}{_more(strange)}, which is no prunable matrix of "
                f"{label} (they are named like {shown(next(iter(known), ''))}); give masks of the same model"
            )
        self.targets = [target for key, target in known.items() if key in masks.shapes]
        self.dense = [key for key in known if key not in masks.shapes]
        other = [target for target in self.targets if target.shape != masks.shapes[target.key]]
        if other:
            mask, own = masks.shapes[other[0].key], other[0].shape
            raise ValueError(
                f"the mask of {other[0].key} in {path} is {mask[0]} x {mask[1]} and the matrix of {label} "
                f"{own[0]} x {own[1]}{_more(other, ' likewise')}; give masks of a model of this size"
            )
        self._keys = {target.name: target.key for target in self.targets}

    def __contains__(self, name: object) -> bool:
        """Whether the matrix of this name has a mask."""
        return name in self._keys

    def keep(self, name: str) -> Tensor:
        """The keep mask of a matrix, by the matrix's name, bool [R, C]."""
        return self.masks.load(self._keys[name])


def _more(items: list[Target] | list[str], how: str = "") -> str:
    return f" (and {len(items) - 1} more{how})" if len(items) > 1 else ""
