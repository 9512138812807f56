"""The corridor: the one loop where the rooms meet. Block by block: load, collect, prune, check, forward, write, free."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from llmprune.checkpoint.masks import pack
from llmprune.checkpoint.reader import WeightSource, read_ahead
from llmprune.contracts import CalibrationSet, InputStats
from llmprune.machine.device import exact_matmul, wait_for
from llmprune.machine.processes import Team, share_out
from llmprune.model.activations import BlockInputs, Store
from llmprune.model.skeleton import Skeleton
from llmprune.model.targets import Target, find_targets
from llmprune.planning.needs import needs_dense, needs_of
from llmprune.planning.plan import Plan
from llmprune.recipe.types import Recipe
from llmprune.run.matrix import Row, prune_matrix
from llmprune.run.observer import Observer
from llmprune.run.permuter import ChannelPermuter
from llmprune.run.tuner import BlockTuner
from llmprune.statistics.sums import sample_positions

Tensors = dict[str, Tensor]
BlockDone = Callable[[int, Tensors, Tensors, list[Row], Mapping[str, float]], None]


class Clock:
    """Seconds by phase, since the start and since the last block."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device, self._last = device, time.monotonic()

    def lap(self, phase: str, of_it: tuple[str, float] = ("", 0.0)) -> None:
        """Count the time since the last lap to a phase, but for the part of it that belongs to another."""
        wait_for(self._device)
        now = time.monotonic()
        for name, seconds in ((phase, now - self._last - of_it[1]), of_it):
            if name:
                self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self._last = now


def prune_blocks(
    recipe: Recipe,
    plan: Plan,
    skeleton: Skeleton,
    source: WeightSource,
    calibration: CalibrationSet,
    finished: int,
    team: Team,
    clock: Clock,
    store: Store,
    note: Callable[[str], None],
    block_done: BlockDone,
    beside: BlockInputs | None = None,
) -> None:
    """Prune every block but the `finished` first, which `source` holds pruned already. The model is never whole in memory.

    `block_done` gets the number of a block (from 1), its tensors as they are to be stored, its packed masks and its record rows.
    `beside` is moved on through the pruned blocks, the last one too, and decides nothing.
    """
    share = team.share(plan.samples)
    positions = sample_positions(plan.samples, plan.sequence_length, recipe.seed)
    inputs = BlockInputs(skeleton, calibration.tokens[share], skeleton.device, store, note)
    # The dense model's stream runs beside the pruned one where an algorithm holds the one against the other.
    dense = (
        BlockInputs(skeleton, calibration.tokens[share], skeleton.device, store)
        if needs_dense(recipe)
        else None
    )
    permuter = (
        ChannelPermuter(plan, skeleton, inputs, positions, share, team, recipe.seed)
        if recipe.permute
        else None
    )
    observer = Observer(needs_of(recipe), inputs, dense, positions, share, team, note)
    tuner = BlockTuner(recipe, inputs, dense, skeleton, share, plan.samples, team)
    clock.lap("forward")
    tensors = read_ahead(source, skeleton.block_tensors())
    for number, block_name in enumerate(skeleton.blocks):
        shard, names = next(tensors), skeleton.parameters_of(block_name)
        if number < finished and (dense or (permuter and not permuter.knows(number))):
            unpruned = {where: skeleton.source.load(where) for where in skeleton.block_tensors()[number]}
            skeleton.fill(names, unpruned)
            if permuter:
                permuter.permute(number, unpruned)
            if dense:
                dense.forward(number)
            del unpruned
        skeleton.fill(names, shard)
        clock.lap("read")
        masks: Tensors = {}
        rows: list[Row] = []
        if number >= finished:
            block = skeleton.blocks[block_name]
            targets = [t for t in find_targets(block_name, block) if t.name in plan.matrices]
            notes = permuter.permute(number, shard) if permuter else {}
            clock.lap("permute" if permuter else "read")
            unpruned = dict(shard) if tuner.steps else {}
            originals: Tensors = dict(block.named_parameters()) if dense else {}
            stats: dict[str, InputStats] = {}
            for group, found in observer.grouped(number, targets, originals, recipe.order, plan.pausing):
                clock.lap("forward", ("statistics", observer.watch.take()))
                more_masks, more_rows = _prune_block(group, found, notes, shard, skeleton, plan, recipe, team)
                masks, rows, stats = masks | more_masks, rows + more_rows, stats | found
                del found
                clock.lap("prune")
            if dense:
                dense.forward(number, originals)
            del originals
            clock.lap("forward")
            tuner.tune(number, targets, shard, unpruned, masks, rows, stats)
            clock.lap("tune" if tuner.steps else "prune")
            del stats, targets, unpruned
        if number + 1 < len(skeleton.blocks):
            observer.advance(number)
        else:
            observer.drop()
        if beside:
            beside.forward(number)
        skeleton.free(names)
        clock.lap("forward" if number >= finished else "replay")
        if number >= finished:
            block_done(number + 1, shard, masks, rows, clock.seconds)
        clock.lap("write")
        del shard


def _prune_block(
    targets: list[Target],
    stats: Mapping[str, InputStats],
    notes: Mapping[str, Row],
    shard: Tensors,
    skeleton: Skeleton,
    plan: Plan,
    recipe: Recipe,
    team: Team,
) -> tuple[Tensors, list[Row]]:
    """Every matrix of a block, shared out among the processes; all end with the same weights in module and shard, masks and rows."""
    pruner, steps = recipe.build_pruner(), recipe.build_steps()
    owner = share_out({t.name: t.shape[0] * t.shape[1] for t in targets}, team.size)
    masks: Tensors = {}
    rows: dict[str, Row] = {}
    for target in targets:
        stored = skeleton.stored[target.weight_name]
        if owner[target.name] == team.rank:
            with exact_matmul():
                weight, keep, row = prune_matrix(
                    target,
                    plan.matrices[target.name],
                    stats[target.name],
                    pruner,
                    steps,
                    recipe,
                    shard[stored],
                )
            shard[stored], masks[stored], rows[stored] = (
                target.stored(weight),
                pack(keep),
                {"name": stored, **row, **notes.get(target.name, {})},
            )
            target.assign(shard[stored])
        else:
            shard[stored] = torch.empty_like(shard[stored])
            masks[stored] = torch.empty(target.shape[0], -(-target.shape[1] // 8), dtype=torch.uint8)
            rows[stored] = {}
    for target in targets if not team.alone else ():
        stored = skeleton.stored[target.weight_name]
        team.from_rank(owner[target.name], shard[stored])
        team.from_rank(owner[target.name], masks[stored])
        rows[stored] = team.tell(rows[stored], owner[target.name])
        target.assign(shard[stored])
    return masks, list(rows.values())
