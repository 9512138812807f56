"""A block's steps as a whole, after its matrices are pruned: the tuned weights go back into module, shard and record."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmprune.checkpoint.masks import unpack
from llmprune.contracts import BlockJob, BlockStep, InputStats, Tuned
from llmprune.machine.processes import Team
from llmprune.model.activations import BlockInputs
from llmprune.model.skeleton import Skeleton
from llmprune.model.targets import Target
from llmprune.numerics.counts import all_finite
from llmprune.recipe.types import AlgorithmSpec, Recipe
from llmprune.run.matrix import Row, measured, seeded

Tensors = dict[str, Tensor]


class BlockTuner:
    """Runs the block steps of a recipe, if it has any.

    Args:
        inputs: the pruned model's stream of block inputs. dense: the dense model's, which has passed the block that is tuned.
        share: which of all `sequences` this process holds.
    """

    def __init__(
        self,
        recipe: Recipe,
        inputs: BlockInputs,
        dense: BlockInputs | None,
        skeleton: Skeleton,
        share: slice,
        sequences: int,
        team: Team,
    ) -> None:
        self.steps, self._seed = recipe.build_block_steps(), recipe.seed
        self._inputs, self._skeleton, self._share, self._sequences, self._team = (
            inputs,
            skeleton,
            share,
            sequences,
            team,
        )
        self._dense = dense

    def tune(
        self,
        number: int,
        targets: list[Target],
        shard: Tensors,
        dense: Tensors,
        masks: Tensors,
        rows: list[Row],
        stats: Mapping[str, InputStats],
    ) -> None:
        """Tune block `number`; weights in module and shard and the rows of the record change in place, on every process alike.

        `dense`: the block's tensors as they are stored, before pruning.
        """
        block = list(self._skeleton.blocks)[number]
        for spec, step in self.steps:
            chosen = {t.weight_name.removeprefix(f"{block}."): t for t in targets if spec.applies(t.name)}
            if not chosen:
                continue
            tuned = self._apply(step, self._job(block, number, chosen, shard, masks))
            for name, target in chosen.items():
                self._put(name, target, step, tuned, shard, masks)
                row = next(r for r in rows if r["name"] == self._skeleton.stored[target.weight_name])
                self._describe(
                    row, spec, target, shard[row["name"]], dense[row["name"]], stats[target.name], tuned
                )

    def _job(
        self, block: str, number: int, chosen: Mapping[str, Target], shard: Tensors, masks: Tensors
    ) -> BlockJob:
        stored, dtype, device = self._skeleton.stored, self._skeleton.dtype, self._skeleton.device
        first, dense = self._share.start, self._dense
        assert dense is not None

        def outputs(weights: Mapping[str, Tensor], rows: list[int]) -> Tensor:
            hidden = self._inputs.hidden([r - first for r in rows])
            return self._inputs.outputs(
                number, hidden, {name: weight.to(dtype) for name, weight in weights.items()}
            )

        return BlockJob(
            name=block,
            weights={n: shard[stored[t.weight_name]].to(device, torch.float32) for n, t in chosen.items()},
            keeps={
                n: t.stored(unpack(masks[stored[t.weight_name]], t.shape[1])).to(device)
                for n, t in chosen.items()
            },
            sequences=self._sequences,
            mine=range(self._share.start, self._share.stop),
            batch=self._inputs.batch,
            outputs=outputs,
            targets=lambda rows: dense.hidden([r - first for r in rows]),
            add=self._team.add,
            generator=seeded(self._seed, block),
        )

    def _apply(self, step: BlockStep, job: BlockJob) -> Tuned:
        try:
            return step.apply(job)
        except (RuntimeError, MemoryError) as error:
            self._inputs.halve(error)
            generator = seeded(self._seed, job.name)
        return self._apply(step, dataclasses.replace(job, batch=self._inputs.batch, generator=generator))

    def _put(
        self, name: str, target: Target, step: BlockStep, tuned: Tuned, shard: Tensors, masks: Tensors
    ) -> None:
        stored = self._skeleton.stored[target.weight_name]
        weight, keep = tuned.weights[name].detach(), target.stored(unpack(masks[stored], target.shape[1]))
        if not all_finite(weight):
            raise RuntimeError(
                f"{type(step).__name__} on {target.name} made NaN or Inf weights; use more calibration samples or lower rates"
            )
        weight = weight.cpu().to(shard[stored].dtype)
        if bool(((weight != 0) & ~keep).any()):
            raise RuntimeError(
                f"{type(step).__name__} on {target.name} left weights where its mask says zero"
            )
        shard[stored] = weight.contiguous()
        target.assign(shard[stored])

    @staticmethod
    def _describe(
        row: Row,
        spec: AlgorithmSpec,
        target: Target,
        final: Tensor,
        dense: Tensor,
        stats: InputStats,
        tuned: Tuned,
    ) -> None:
        news: dict[str, Any] = {
            **measured(target.view(dense), target.view(final), stats),
            "steps": [*row["steps"], spec.name],
            **tuned.notes,
        }
        row.update(news)
