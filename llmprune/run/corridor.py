"""The one loop over blocks: load, collect statistics, prune, run forward, write, free.

The model is never whole in memory. Whatever else goes through the blocks (the dense model beside the pruned
one, reordered channels, tuning of whole blocks) is a `Companion`, so the loop is the same for every recipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llmprune.checkpoint.masks import pack
from llmprune.checkpoint.reader import WeightSource
from llmprune.contracts import InputStats
from llmprune.machine.device import exact_matmul
from llmprune.machine.processes import share_out
from llmprune.model.activations import BlockInputs
from llmprune.model.target import Target
from llmprune.numerics.grids import GROUP
from llmprune.planning.needs import needs_dense, needs_of
from llmprune.run.block import Block, BlockDone, Companion, blocks_of
from llmprune.run.clock import Clock
from llmprune.run.matrix import Methods, Row, prune_matrix
from llmprune.run.observer import Observer
from llmprune.run.permuter import ChannelPermuter
from llmprune.run.shared import Run
from llmprune.run.streams import DenseStream
from llmprune.run.tuner import BlockTuner


def prune_blocks(
    run: Run,
    source: WeightSource,
    finished: int,
    clock: Clock,
    block_done: BlockDone,
    beside: Sequence[Companion] = (),
) -> None:
    """Prune every block except the `finished` first ones, which `source` holds pruned already.

    Args:
        run: recipe, plan, model and all else that the run shares. source: the weights.
        clock: counts the seconds of every phase.
        block_done: gets every block that is done.
        beside: more companions, which pass every block last.
    """
    inputs = BlockInputs(run.skeleton, run.tokens, run.skeleton.device, run.store, run.reporter.note)
    dense = DenseStream(run) if needs_dense(run.recipe) else None
    observer = Observer(run, needs_of(run.recipe), inputs, dense.inputs if dense else None)
    companions = [*_companions(run, inputs, dense), observer, *beside]
    clock.lap("forward")
    for block in blocks_of(run, source, finished, clock):
        block.enter(companions)
        _prune_matrices(run, block, observer)
        block.leave(companions)
        block.done(block_done)


def _companions(run: Run, inputs: BlockInputs, dense: DenseStream | None) -> list[Companion]:
    """What the recipe wants to go along, in the order in which it enters and leaves a block."""
    found: list[Companion] = []
    if run.recipe.permute:
        found.append(ChannelPermuter(run, inputs))
    if dense:
        found.append(dense)
    if dense and run.recipe.build_block_steps():  # which compare with what the dense block puts out
        found.append(BlockTuner(run, inputs, dense.inputs))
    return found


def _prune_matrices(run: Run, block: Block, observer: Observer) -> None:
    """Prune the matrices of a block: all at once, or by the input they share."""
    for targets, stats in observer.groups_of(block):
        block.lap("forward", ("statistics", observer.watch.take()))
        _prune_group(run, block, targets, stats)
        block.lap("prune")


def _prune_group(run: Run, block: Block, targets: list[Target], stats: Mapping[str, InputStats]) -> None:
    """Prune some matrices of a block, shared out among the processes.

    On every process module and shard end with the same weights, and the block with the same masks and rows.
    """
    methods, team = Methods.of(run.recipe, run.masks), run.team
    owner = share_out({t.name: t.shape[0] * t.shape[1] for t in targets}, team.size)
    rows: dict[str, Row] = {}
    weights: dict[str, Tensor] = {}
    rounded = run.recipe.bits is not None
    for target in targets:
        key, stored = target.key, block.shard[target.tensor]
        if owner[target.name] == team.rank:
            matrix = run.plan.matrices[target.name]
            with exact_matmul():
                done = prune_matrix(target, matrix, stats.get(target.name), methods, stored)
            weight, block.masks[key] = target.stored(done.weight), pack(done.keep)
            rows[key] = {"name": key, **done.row, **block.notes.get(target.name, {})}
            if done.scales is not None:
                block.scales[key] = done.scales
            block.put(target, weight)
            if not team.alone:
                weights[key] = weight
        else:
            weights[key] = torch.empty_like(target.part(stored), dtype=methods.dtype)
            height, width = target.shape
            block.masks[key] = torch.empty(height, -(-width // 8), dtype=torch.uint8)
            if rounded:
                block.scales[key] = torch.empty(height, -(-width // GROUP), dtype=torch.bfloat16)
            rows[key] = {}
    for target in targets if not team.alone else ():
        key = target.key
        team.from_rank(owner[target.name], weights[key])
        team.from_rank(owner[target.name], block.masks[key])
        if rounded:
            team.from_rank(owner[target.name], block.scales[key])
        rows[key] = team.tell(rows[key], owner[target.name])
        if owner[target.name] != team.rank:
            block.put(target, weights[key])
    block.rows += rows.values()
    if block.keeps_stats:
        block.stats |= stats
