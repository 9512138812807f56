"""Block tuning (as in EBFT, arXiv 2402.12419): a few hundred AdamW steps on a block's kept weights against
the dense model's outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmprune.contracts import BlockJob, BlockStep, Tuned
from llmprune.numerics.grids import Straight, spread


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
        held, training = order[:held_count], order[held_count:]
        seed = int(torch.randint(1 << 62, (1,), generator=job.generator))
        kept = {name: keep.float() for name, keep in job.keeps.items()}  # products with bool are much slower
        before = _error(job, job.weights, held)
        tuned = Tuned({})
        for rate in self.config.rates:
            tuned = Tuned({})  # the memory of a rate that failed is free before the next begins
            tuned = _Descent(self.config, job, kept, training, rate, seed).finish()
            after = _error(job, tuned.weights, held)
            if after < before:  # false for NaN too
                break
        applied = after < before
        notes = {"rate": rate, "held_out_before": before, "held_out_after": after, "applied": applied}
        tuned = tuned if applied else Tuned(job.weights, scales=job.scales)
        return replace(tuned, notes={"tune": notes})


class _Descent:
    """One run of AdamW at one learning rate."""

    def __init__(
        self,
        config: BlockTune.Config,
        job: BlockJob,
        kept: Mapping[str, Tensor],
        training: list[int],
        rate: float,
        seed: int,
    ) -> None:
        self._config, self._job, self._kept, self._training, self._rate = config, job, kept, training, rate
        self._generator = torch.Generator().manual_seed(seed)
        self._weights = {name: weight.clone().requires_grad_() for name, weight in job.weights.items()}
        self._sizes = [_root_mean_square(weight, kept[name]) for name, weight in job.weights.items()]
        # Of the scales their logarithms are trained, so that they stay positive.
        self._growths = {n: torch.zeros_like(s, dtype=torch.float32) for n, s in job.scales.items()}
        self._sizes += [config.scale_rate for growth in self._growths.values()]
        trained = [*self._weights.values(), *(g.requires_grad_() for g in self._growths.values())]
        self._optimizer = torch.optim.AdamW(
            [{"params": [parameter]} for parameter in trained],
            lr=rate,
            betas=(0.9, 0.95),
            eps=1e-12,
            weight_decay=0.0,
            fused=True,
        )
        self._queue: list[int] = []

    def finish(self) -> Tuned:
        """Do all steps; returns the weights and their scales."""
        for step in range(self._config.steps):
            # A short warm-up, then a cosine that falls to 0: the
            # small last steps leave no noise in the weights.
            warm_up = min(1.0, (step + 1) / 10)
            decay = 0.5 * (1 + math.cos(math.pi * step / self._config.steps))
            for group, size in zip(self._optimizer.param_groups, self._sizes, strict=True):
                group["lr"] = self._rate * size * warm_up * decay
            self._gradients(self._next())
            self._optimizer.step()
            with torch.no_grad():
                for name, weight in self._weights.items():
                    weight.mul_(self._kept[name])
        with torch.no_grad():
            scales = {name: self._scale(name).bfloat16() for name in self._growths}
            return Tuned({name: w.detach() for name, w in self._present().items()}, scales=scales)

    def _scale(self, name: str) -> Tensor:
        """The scales of a weight as they are now; they are stored in bfloat16."""
        scale = self._job.scales[name].float() * self._growths[name].exp()
        return scale + (scale.bfloat16().float() - scale).detach()

    def _present(self) -> dict[str, Tensor]:
        """The weights that the block computes with: those that are trained, rounded where they must be."""
        if not self._growths:
            return self._weights
        return {
            name: Straight.apply(weight, spread(self._scale(name), weight.shape), self._job.bits)
            for name, weight in self._weights.items()
        }

    def _next(self) -> list[int]:
        """The sequences of the next batch, from a shuffled queue that is refilled where it runs short."""
        if len(self._queue) < self._config.batch:
            order = torch.randperm(len(self._training), generator=self._generator).tolist()
            self._queue = [self._training[i] for i in order]
        batch, self._queue = self._queue[: self._config.batch], self._queue[self._config.batch :]
        return batch

    def _gradients(self, batch: list[int]) -> None:
        """Compute the gradients of the batch's loss, the same on every process.

        Pruned weights get gradients too, but they are set to zero again after the step.
        """
        job, present = self._job, self._present()
        weights = present
        if self._growths:
            weights = {name: weight.detach().requires_grad_() for name, weight in present.items()}
        for weight in weights.values():
            weight.grad = torch.zeros_like(weight)
        size = torch.zeros((), dtype=torch.float64)
        for part in _parts(job, batch):
            with torch.enable_grad():
                targets = job.targets(part).float()
                error = (job.outputs(weights, part).float() - targets).square().sum()
                error.backward()
            size += targets.square().sum().double().cpu()
        job.add(size, *(weight.grad for weight in weights.values()))
        for weight in weights.values():
            assert weight.grad is not None
            weight.grad.div_(float(size))
        if self._growths:
            self._optimizer.zero_grad()
            torch.autograd.backward(list(present.values()), [w.grad for w in weights.values()])


def _root_mean_square(weight: Tensor, keep: Tensor) -> float:
    """The root mean square of the kept weights; 1 where none differs from 0."""
    size = float(weight.double().square().sum() / keep.sum().clamp(min=1))
    return math.sqrt(size) or 1.0


@torch.no_grad()
def _error(job: BlockJob, weights: Mapping[str, Tensor], held: list[int]) -> float:
    """Squared error divided by the squared dense outputs, on some sequences of all processes."""
    sums = torch.zeros(2, dtype=torch.float64)
    for part in _parts(job, held):
        targets = job.targets(part).float()
        sums[0] += (job.outputs(weights, part).float() - targets).square().sum().double().cpu()
        sums[1] += targets.square().sum().double().cpu()
    job.add(sums)
    return float(sums[0] / sums[1])


def _parts(job: BlockJob, sequences: list[int]) -> list[list[int]]:
    """Those of the sequences that this process holds, in batches that fit into memory."""
    mine = [s for s in sequences if s in job.mine]
    return [mine[i : i + job.batch] for i in range(0, len(mine), job.batch)]
