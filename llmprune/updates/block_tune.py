"""Block tuning (as in EBFT, arXiv 2402.12419): a few hundred AdamW steps on a block's kept weights against
the dense model's outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.contracts import BlockJob, BlockStep, Tuned
from llmprune.recovery.loop import Diverged, Loop
from llmprune.recovery.method import Method, RateSpec
from llmprune.recovery.objectives.block import Block
from llmprune.recovery.optimizer import OptimizerSpec
from llmprune.recovery.parts import Matrix
from llmprune.recovery.phases import Numbers
from llmprune.recovery.schedules.fixed import Fixed
from llmprune.recovery.task import Outputs, Task, Term
from llmprune.recovery.trainables.kept import Kept
from llmprune.recovery.trainables.rounded import Rounded


class BlockTune(BlockStep):
    """Trains a pruned block so that its outputs come near to those of the same block in the dense model.

    The pruned block gets the outputs of the pruned blocks before it, the dense block
    those of the dense model. The loss is the squared error divided by the squared dense
    outputs. Some calibration sequences are held out. If the steps do not lower the error on
    them, they are done anew with the next learning rate; if none does, the weights stay
    unchanged.

    Where the weights are rounded (`BlockJob.scales`), every forward pass rounds them again, and the gradient
    passes the rounding (`grids.Straight`); their scales are trained too.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of block tuning.

        Attributes:
            steps: of AdamW.
            batch: sequences per step.
            rates: learning rates, tried in this order, relative to the root mean square of a
                matrix's kept weights, since the steps of AdamW do not follow the size of a
                weight; each falls by a cosine over the steps.
            held_out: share of the calibration sequences that are not trained on.
            scale_rate: learning rate of the scales of rounded weights, relative to each and to that of the
                weights.
        """

        steps: int = 140
        batch: int = 2
        rates: tuple[float, ...] = (0.025, 0.008, 0.0025)
        held_out: float = 0.125
        scale_rate: float = 0.1

        def __post_init__(self) -> None:
            for name in ("steps", "batch"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
            if not self.rates or not all(0 < rate < 1 for rate in self.rates):
                raise ValueError(f"rates must be learning rates in (0, 1), got {self.rates}")
            if not 0 <= self.scale_rate <= 1:
                raise ValueError(f"scale_rate must be in [0, 1], got {self.scale_rate}")
            if not 0 < self.held_out < 1:
                raise ValueError(f"held_out must be in (0, 1), got {self.held_out}")

    @property
    def trained(self) -> float:  # type: ignore[override]
        return self.config.steps * self.config.batch  # type: ignore[no-any-return]

    @property
    def visits(self) -> float:  # type: ignore[override]
        return 15 * self.trained / self.config.batch  # type: ignore[no-any-return]

    def apply(self, job: BlockJob) -> Tuned:
        if job.sequences < 2:
            raise ValueError(
                f"block-tune holds out calibration sequences and needs at least 2, got {job.sequences}"
            )
        order = torch.randperm(job.sequences, generator=job.generator).tolist()
        held_count = min(max(1, round(self.config.held_out * job.sequences)), job.sequences - 1)
        seed = int(torch.randint(1 << 62, (1,), generator=job.generator))
        task = _task(job, order[held_count:], order[:held_count])
        terms = (Term(Block()),)
        before, rate, after = None, 0.0, float("inf")
        loop = None
        for rate in self.config.rates:
            loop = None  # the memory of a rate that failed is free before the next begins
            loop = Loop(task, self._method(job, terms, rate, seed))
            before = loop.error(terms) if before is None else before
            try:
                while not loop.done:
                    loop.advance()
                after = loop.error(terms)
            except Diverged:
                after = float("nan")
            if after < before:  # false for NaN too
                break
        assert loop is not None and before is not None
        applied = after < before
        notes = {"rate": rate, "held_out_before": before, "held_out_after": after, "applied": applied}
        if not applied:
            return Tuned(job.weights, {"tune": notes}, job.scales)
        weights = {name: loop.merged(name) for name in job.weights}
        scales = {
            n: t.scales().detach().bfloat16() for n, t in loop.trained.items() if isinstance(t, Rounded)
        }
        return Tuned(weights, {"tune": notes}, scales)

    def _method(self, job: BlockJob, terms: tuple[Term, ...], rate: float, seed: int) -> Method:
        config = self.config
        rounded = Rounded.Config(scale_rate=config.scale_rate)
        trainable = (lambda: Rounded(rounded)) if job.scales else Kept
        return Method(
            schedule=Fixed(),
            rule=None,
            numbers=Numbers(),
            terms=terms,
            trainable=trainable,
            # A short warm-up, then a cosine that falls to 0: the small last steps leave no noise.
            rate=RateSpec(rate=rate, warm_up=10, relative=True),
            optimizer=OptimizerSpec(betas=(0.9, 0.95), eps=1e-12),
            steps=config.steps,
            batch=config.batch,
            seed=seed,
        )


def _task(job: BlockJob, training: list[int], held: list[int]) -> Task:
    """The block as something to train."""

    def student(weights: Mapping[str, Tensor], rows: list[int]) -> Outputs:
        return Outputs(None, [job.outputs({name: weights[name] for name in weights}, rows)])

    def teacher(rows: list[int]) -> Outputs:
        return Outputs(None, [job.targets(rows)])

    matrices = {
        name: Matrix(weight, job.keeps[name], scales=job.scales.get(name), bits=job.bits)
        for name, weight in job.weights.items()
    }
    return Task(
        matrices=matrices,
        sequences=training,
        held=held,
        tokens=lambda rows: torch.zeros(len(rows), 1, dtype=torch.int64),
        student=student,
        teacher=teacher,
        mine=lambda rows: [row for row in rows if row in job.mine],
        batch=job.batch,
        shared=len(job.mine) < job.sequences,
        add=job.add,
    )
