"""Tuning a whole block after its matrices are pruned: the tuned weights go into module, shard and record."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from llmprune.checkpoint.masks import unpack
from llmprune.contracts import BlockJob, BlockStep, Tuned
from llmprune.model.activations import BlockInputs
from llmprune.model.target import Target
from llmprune.numerics.counts import all_finite
from llmprune.numerics.grids import GROUP
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
        self._unpruned = block.dense()

    def leave(self, block: Block) -> None:
        """Tune the block; weights, module and rows of the record change in place, on every process alike."""
        for spec, step in self._steps:
            chosen = self._chosen(spec, block)
            if not chosen:
                continue
            tuned = self._apply(step, self._job(block, chosen))
            for target in dict.fromkeys(target for targets in chosen.values() for target in targets):
                self._put(target.gather(_of_block(tuned.weights, block)), target, step, block)
                if tuned.scales:
                    block.scales[target.key] = target.gather(_of_block(tuned.scales, block), GROUP).cpu()
                self._describe(spec, target, block, tuned)
        self._unpruned = {}

    def _chosen(self, spec: AlgorithmSpec, block: Block) -> dict[str, list[Target]]:
        """The parameters to be tuned, by name in the block, with the pruned matrices they hold.

        Left out are parameters of which a part is not to be tuned or belongs to no pruned matrix, and the
        matrices that lie in such a parameter.
        """
        fitting = [target for target in block.targets if spec.applies(target.name)]
        while True:
            inside: dict[str, int] = dict.fromkeys((name for t in fitting for name in t.owners), 0)
            for target in fitting:
                for piece in target.pieces:
                    inside[piece.parameter] += piece.height * target.shape[1]
            model = self._skeleton.model
            partly = {name for name, count in inside.items() if count < model.get_parameter(name).numel()}
            if not partly:
                break
            fitting = [target for target in fitting if not partly & set(target.owners)]
        found: dict[str, list[Target]] = {}
        for target in fitting:
            for parameter in target.owners:
                found.setdefault(parameter.removeprefix(f"{block.name}."), []).append(target)
        return found

    def _job(self, block: Block, chosen: Mapping[str, list[Target]]) -> BlockJob:
        dtype, device = self._skeleton.dtype, self._skeleton.device
        share, number = self._run.share, block.number

        def outputs(weights: Mapping[str, Tensor], rows: list[int]) -> Tensor:
            own = [r - share.start for r in rows]
            return self._inputs.run(number, own, {n: w.to(dtype) for n, w in weights.items()})

        def wanted(rows: list[int]) -> Tensor:
            return self._dense.hidden([r - share.start for r in rows])

        weights, keeps, scales = {}, {}, {}
        bits = self._run.recipe.bits or 0
        shapes = {name: parameter.shape for name, parameter in block.module.named_parameters()}
        for name, targets in chosen.items():
            weights[name] = torch.empty(shapes[name], dtype=torch.float32, device=device)
            keeps[name] = torch.ones(shapes[name], dtype=torch.bool, device=device)
            if bits:
                fewer = targets[0].grouped(f"{block.name}.{name}", shapes[name], GROUP)
                scales[name] = torch.empty(fewer, dtype=torch.bfloat16, device=device)
        for target in dict.fromkeys(target for targets in chosen.values() for target in targets):
            target.scatter(target.oriented(block.weight(target)), _of_block(weights, block))
            target.scatter(unpack(block.masks[target.key], target.shape[1]), _of_block(keeps, block))
            if bits:
                target.scatter(block.scales[target.key], _of_block(scales, block))
        return BlockJob(
            name=block.name,
            weights=weights,
            keeps=keeps,
            sequences=self._run.sequences,
            mine=range(share.start, share.stop),
            batch=self._inputs.batch,
            outputs=outputs,
            targets=wanted,
            add=self._run.team.add,
            generator=seeded(self._run.recipe.seed, block.name),
            scales=scales,
            bits=bits,
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
        keep = unpack(block.masks[target.key], target.shape[1])
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
        block.put(target, target.stored(weight.masked_fill(~keep, 0.0)))  # else some are -0.0

    def _describe(self, spec: AlgorithmSpec, target: Target, block: Block, tuned: Tuned) -> None:
        """Bring the matrix's row of the record up to date."""
        row = next(r for r in block.rows if r["name"] == target.key)
        dense, final = target.view(self._unpruned[target.tensor]), target.view(block.shard[target.tensor])
        row.update(measured(dense, final, block.stats.get(target.name)))
        row.update(steps=[*row["steps"], spec.name])
        row.update(tuned.notes)


def _of_block(tensors: Mapping[str, Tensor], block: Block) -> dict[str, Tensor]:
    """The same tensors by their names in the model."""
    return {f"{block.name}.{name}": tensor for name, tensor in tensors.items()}
