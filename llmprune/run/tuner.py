"""Tuning a whole block after its matrices are pruned: the tuned weights go into module, shard and record."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from llmprune.checkpoint.masks import unpack
from llmprune.contracts import BlockJob, BlockStep, Tuned
from llmprune.model.activations import BlockInputs
from llmprune.model.targets import Target
from llmprune.numerics.counts import all_finite
from llmprune.recipe.types import AlgorithmSpec
from llmprune.run.block import Block, Companion
from llmprune.run.matrix import measured, seeded
from llmprune.run.shared import Run


class BlockTuner(Companion):
    """Runs the block steps of a recipe.

    Args:
        run: the run. inputs: the block inputs of the pruned model.
        dense: those of the dense model, which has left the block before this object does.
    """

    phase = "tune"

    def __init__(self, run: Run, inputs: BlockInputs, dense: BlockInputs) -> None:
        self._steps, self._run, self._inputs, self._dense = run.recipe.build_block_steps(), run, inputs, dense
        self._skeleton = run.skeleton
        self._unpruned: dict[str, Tensor] = {}

    def enter(self, block: Block) -> None:
        """Keep the dense weights: the error of the tuned ones is measured against them."""
        self._unpruned = dict(block.shard)

    def leave(self, block: Block) -> None:
        """Tune the block; weights, module and rows of the record change in place, on every process alike."""
        for spec, step in self._steps:
            in_block = {t.weight_name.removeprefix(f"{block.name}."): t for t in block.targets}
            chosen = {name: target for name, target in in_block.items() if spec.applies(target.name)}
            if not chosen:
                continue
            tuned = self._apply(step, self._job(block, chosen))
            for name, target in chosen.items():
                self._put(tuned.weights[name], target, step, block)
                self._describe(spec, target, block, tuned)
        self._unpruned = {}

    def _job(self, block: Block, chosen: Mapping[str, Target]) -> BlockJob:
        stored, dtype, device = self._skeleton.stored, self._skeleton.dtype, self._skeleton.device
        share, number = self._run.share, block.number

        def outputs(weights: Mapping[str, Tensor], rows: list[int]) -> Tensor:
            hidden = self._inputs.hidden([r - share.start for r in rows])
            return self._inputs.outputs(number, hidden, {n: w.to(dtype) for n, w in weights.items()})

        def targets(rows: list[int]) -> Tensor:
            return self._dense.hidden([r - share.start for r in rows])

        weights, keeps = {}, {}
        for name, target in chosen.items():
            where = stored[target.weight_name]
            weights[name] = block.weight(target).to(device, torch.float32)
            keeps[name] = target.stored(unpack(block.masks[where], target.shape[1])).to(device)
        return BlockJob(
            name=block.name,
            weights=weights,
            keeps=keeps,
            sequences=self._run.sequences,
            mine=range(share.start, share.stop),
            batch=self._inputs.batch,
            outputs=outputs,
            targets=targets,
            add=self._run.team.add,
            generator=seeded(self._run.recipe.seed, block.name),
        )

    def _apply(self, step: BlockStep, job: BlockJob) -> Tuned:
        try:
            return step.apply(job)
        except (RuntimeError, MemoryError) as error:
            self._inputs.halve(error)
            generator = seeded(self._run.recipe.seed, job.name)
        return self._apply(step, dataclasses.replace(job, batch=self._inputs.batch, generator=generator))

    def _put(self, weight: Tensor, target: Target, step: BlockStep, block: Block) -> None:
        """Put a tuned weight into module and shard. Raises `RuntimeError` where the step broke its mask."""
        stored = self._skeleton.stored[target.weight_name]
        keep = target.stored(unpack(block.masks[stored], target.shape[1]))
        if not all_finite(weight):
            raise RuntimeError(
                f"{type(step).__name__} on {target.name} made NaN or Inf weights; "
                "use more calibration samples or lower rates"
            )
        weight = weight.detach().cpu()
        if bool(((weight != 0) & ~keep).any()):
            raise RuntimeError(
                f"{type(step).__name__} on {target.name} left weights where its mask says zero"
            )
        block.put(target, weight)

    def _describe(self, spec: AlgorithmSpec, target: Target, block: Block, tuned: Tuned) -> None:
        """Bring the matrix's row of the record up to date."""
        stored = self._skeleton.stored[target.weight_name]
        row = next(r for r in block.rows if r["name"] == stored)
        dense, final = target.view(self._unpruned[stored]), target.view(block.shard[stored])
        row.update(measured(dense, final, block.stats[target.name]))
        row.update(steps=[*row["steps"], spec.name])
        row.update(tuned.notes)
