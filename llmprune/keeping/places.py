"""Which parameters of a model in memory the keep masks of a folder or file belong to."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.checkpoint.contents import CONFIG
from llmprune.checkpoint.masks import KeepMasks
from llmprune.checkpoint.reader import MemoryCheckpoint
from llmprune.checkpoint.stored_masks import holds_masks, masks_at
from llmprune.keeping.kept import Kept
from llmprune.keeping.owned import Owned, check_layers, found, state_of
from llmprune.model.masking import Masking
from llmprune.model.opening import read_folder, recorded_blocks
from llmprune.model.skeleton import Skeleton
from llmprune.model.target import Target
from llmprune.model.targets import targets_of


@dataclass(frozen=True)
class Places:
    """The masks of a model in memory.

    Attributes:
        label: the model's name in messages.
        origin: where the masks come from; None where they were taken from the weights that are not zero.
        targets: the matrices that have a mask.
        dense: the names of those that have none.
        kept: by name, the parameters that hold them.
    """

    label: str
    origin: Path | None
    targets: list[Target]
    dense: list[str]
    kept: dict[str, Kept]

    @property
    def source(self) -> str:
        """Where the masks come from, as part of a sentence."""
        if self.origin is not None:
            return f"of {self.origin}"
        return (
            f"the folder of {self.label} has none, so the weights that are zero now stay zero, also where "
            "one was kept and happens to be zero; masks=FOLDER names those of the run"
        )

    def counts(self) -> Iterator[dict[str, Any]]:
        """Of every matrix with a mask its `name`, `shape`, how many weights are `pruned` and, of these,
        `filled`: not +0.
        """
        # Matrices in the same parameters follow one another; their masks are unpacked once.
        for names, targets in itertools.groupby(self.targets, lambda target: tuple(target.owners)):
            pruned = {name: ~self.kept[name].keep for name in names}
            filled = {name: self.kept[name].filled() for name in names}
            for target in targets:
                yield {
                    "name": target.key,
                    "shape": list(target.shape),
                    "pruned": int(target.gather(pruned).sum()),
                    "filled": int(target.gather(filled).sum()),
                }


def find_places(model: nn.Module, path: Path | None) -> Places:
    """The parameters that hold pruned weights.

    Args:
        model: the plain transformers model, with LoRA layers in it or without.
        path: of the masks; None for those of the folder that the model was loaded from, or else of the
            weights that are not zero.

    Raises:
        ValueError: no masks, or those of another model; weights that are not zero where a mask prunes;
            layers that cannot be trained.
    """
    check_layers(model)
    folder = _own_folder(model)
    if path is None and folder is not None and holds_masks(folder):
        path = folder
    masks = None if path is None else masks_at(path)
    skeleton = _skeleton(model, masks, folder)
    label = Path(getattr(model.config, "name_or_path", "") or type(model).__name__).name
    blocks = [targets_of(skeleton, block) for block in skeleton.blocks]
    every = list(itertools.chain.from_iterable(blocks))
    owned = found(model, skeleton, every)
    keep = _nonzero(owned) if masks is None else _stored(Masking(masks, every, label))
    targets, kept = _kept(blocks, keep, owned)
    if not targets:
        raise ValueError(f"no weight of {label} is zero, so there is nothing to keep; prune it first")
    masked = {target.key for target in targets}
    places = Places(label, path, targets, [t.key for t in every if t.key not in masked], kept)
    _check_zeros(places)
    return places


def _own_folder(model: nn.Module) -> Path | None:
    """The folder that a model was loaded from, if that is still there."""
    named = getattr(model.config, "name_or_path", "")
    return Path(named) if named and Path(named).is_dir() else None


def _skeleton(model: nn.Module, masks: KeepMasks | None, folder: Path | None) -> Skeleton:
    """The model without weights, matched with the tensors that the masks are named after.

    Those are the tensors of the checkpoint, which may be cut in another way than the model's parameters.
    """
    config: Any = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    for part in (config, config.get_text_config()):
        part.__dict__.pop("quantization_config", None)  # of weights that were made dense as they were loaded
    how = torch.float32, torch.device("cpu")
    beside = None if masks is None else masks.path if masks.path.is_dir() else masks.path.parent
    for place in (folder, beside):
        if place is not None and (place / CONFIG).is_file():
            try:
                source = read_folder(place)[1]
                named = masks is None or all(_tensor(n, source.tensors) for n in masks.shapes)
                if named:
                    return Skeleton(config, source, *how, blocks=recorded_blocks(place))
            except ValueError:
                continue  # weights of another model: nothing of theirs is used, and the masks are checked
    return Skeleton(config, MemoryCheckpoint(state_of(model)), *how)


def _tensor(name: str, tensors: Any) -> bool:
    """Whether a mask is named after one of these tensors, or a matrix of it."""
    return name in tensors or name.rpartition(".")[0] in tensors


def _stored(masking: Masking) -> Callable[[Target], Tensor | None]:
    """What gives the mask of a matrix from its file; None where it has none."""
    return lambda target: masking.keep(target.name) if target.name in masking else None


def _nonzero(owned: Owned) -> Callable[[Target], Tensor | None]:
    """What gives the mask of the weights that are not zero; None for a matrix without zeros."""

    def keep(target: Target) -> Tensor | None:
        weights = {name: owned[name][0].get_parameter(owned[name][1]).detach() for name in target.owners}
        kept = (target.gather(weights) != 0).cpu()
        return None if bool(kept.all()) else kept

    return keep


def _kept(
    blocks: list[list[Target]], keep: Callable[[Target], Tensor | None], owned: Owned
) -> tuple[list[Target], dict[str, Kept]]:
    """The matrices that have a mask, and the parameters that hold them."""
    masked: list[Target] = []
    kept: dict[str, Kept] = {}
    for targets in blocks:
        masks: dict[str, Tensor] = {}
        for target in targets:
            mask = keep(target)
            if mask is None:
                continue
            masked.append(target)
            for name in target.owners:
                shape = owned[name][0].get_parameter(owned[name][1]).shape
                masks.setdefault(name, torch.ones(shape, dtype=torch.bool))
            target.scatter(mask, masks)
        kept |= {name: Kept(name, *owned[name], mask) for name, mask in masks.items()}
    return masked, kept


def _check_zeros(places: Places) -> None:
    """Raise `ValueError` where the masks prune weights that are not zero; make every -0 there +0."""
    with torch.no_grad():
        for kept in places.kept.values():
            wrong = int(((kept.parameter != 0) & ~kept.keep).sum())
            if wrong:
                raise ValueError(
                    f"{wrong:,} weights of {kept.name} in {places.label} are not zero where the masks of "
                    f"{places.origin} prune; give the masks of this model, or apply them first: "
                    "llmprune mask apply"
                )
        for kept in places.kept.values():
            kept.clear(kept.parameter)
