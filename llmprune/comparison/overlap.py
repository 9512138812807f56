"""How the masks of runs overlap, pair by pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmprune.checkpoint.masks import KeepMasks
from llmprune.checkpoint.stored_masks import holds_masks, masks_at
from llmprune.comparison.entries import Entry
from llmprune.evaluation.audit import overlap_of


def has_masks(entry: Entry) -> bool:
    """Whether the masks of a run are at hand."""
    return entry.folder is not None and holds_masks(entry.folder)


def overlaps(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """How much of the masks is the same, for every pair of runs of one model whose masks are at hand.

    Every mask is read once.

    Returns:
        A dict per pair with `a`, `b`, and over all matrices the figures of `mask_diff`.

    Raises:
        ValueError: masks that are damaged.
    """
    masks = {e.name: masks_at(e.folder) for e in entries if e.folder is not None and has_masks(e)}
    names, models = list(masks), {e.name: e.identity for e in entries}
    pairs = [
        (a, b)
        for place, a in enumerate(names)
        for b in names[place + 1 :]
        if models[a] == models[b] and masks[a].shapes == masks[b].shapes
    ]
    sums = {pair: [0, 0, 0, 0] for pair in pairs}
    for name in dict.fromkeys(name for own in masks.values() for name in own.shapes):
        _add(name, masks, sums)
    return [{"a": a, "b": b, **overlap_of(*counts)} for (a, b), counts in sums.items()]


def _add(name: str, masks: dict[str, KeepMasks], sums: dict[tuple[str, str], list[int]]) -> None:
    """Count the pruned entries of one matrix for every pair that has it."""
    wanted = {side for pair in sums for side in pair if name in masks[side].shapes}
    pruned = {side: ~masks[side].load(name) for side in wanted}
    counts = {side: int(part.sum()) for side, part in pruned.items()}
    for (a, b), total in sums.items():
        if a in pruned and b in pruned:
            both = int((pruned[a] & pruned[b]).sum())
            for place, count in enumerate((pruned[a].numel(), counts[a], counts[b], both)):
                total[place] += count
