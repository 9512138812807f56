"""Block tuning (as in EBFT, arXiv 2402.12419): a few hundred AdamW steps on a block's kept weights against
the dense model's outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.contracts import BlockJob, BlockStep, Tuned
from llmprune.numerics.gram import finite


class BlockTune(BlockStep):
    """Trains a pruned block so that its outputs come near to those of the same block in the dense model.

    The pruned block gets the outputs of the pruned blocks before it, the dense block
    those of the dense model. The loss is the squared error divided by the squared dense
    outputs. Some calibration sequences are held out. Each learning rate is tried for an
    eighth of the steps, and the one with the lowest held-out error does the rest. If
    that does not lower the held-out error below what it was, the weights stay unchanged.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of block tuning.

        Attributes:
            steps: of AdamW.
            batch: sequences per step.
            rates: learning rates to try; each falls by a cosine over the steps.
            held_out: share of the calibration sequences that are not trained on.
        """

        steps: int = 220
        batch: int = 4
        rates: tuple[float, ...] = (3e-4, 1e-3)
        held_out: float = 0.125

        def __post_init__(self) -> None:
            for name in ("steps", "batch"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
            if not self.rates or not all(0 < rate < 1 for rate in self.rates):
                raise ValueError(f"rates must be learning rates in (0, 1), got {self.rates}")
            if not 0 < self.held_out < 1:
                raise ValueError(f"held_out must be in (0, 1), got {self.held_out}")

    @property
    def trained(self) -> float:  # type: ignore[override]
        # Each rate runs an eighth of the steps, the best one also the rest.
        return self.config.steps * self.config.batch * (1 + (len(self.config.rates) - 1) / 8)  # type: ignore[no-any-return]

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
        best, lowest = None, math.inf
        kept = {name: keep.float() for name, keep in job.keeps.items()}  # products with bool are much slower
        for rate in self.config.rates:
            other = _Descent(self.config, job, kept, training, rate, seed)
            other.go_on(max(1, self.config.steps // 8))
            reached = finite(_error(job, other.weights, held)) if len(self.config.rates) > 1 else 0.0
            if best is None or reached < lowest:
                best, lowest = other, reached
            del other  # frees its weights and optimizer state before the next one is made
        assert best is not None
        best.go_on(self.config.steps)
        before, after = _error(job, job.weights, held), _error(job, best.weights, held)
        applied = after < before
        tuned = {name: weight.detach() for name, weight in best.weights.items()}
        notes = {"rate": best.rate, "held_out_before": before, "held_out_after": after, "applied": applied}
        return Tuned(tuned if applied else job.weights, {"tune": notes})


class _Descent:
    """One run of AdamW at one learning rate, which can be stopped after some steps and continued."""

    def __init__(
        self,
        config: BlockTune.Config,
        job: BlockJob,
        kept: Mapping[str, Tensor],
        training: list[int],
        rate: float,
        seed: int,
    ) -> None:
        self._config, self._job, self._kept, self._training, self.rate = config, job, kept, training, rate
        self._generator = torch.Generator().manual_seed(seed)
        self.weights = {name: weight.clone().requires_grad_() for name, weight in job.weights.items()}
        self._optimizer = torch.optim.AdamW(
            self.weights.values(), lr=rate, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0, fused=True
        )
        self._queue: list[int] = []
        self._step = 0

    def go_on(self, until: int) -> None:
        """Continue until `until` steps are done in all."""
        for step in range(self._step, until):
            # A short warm-up, then a cosine that falls to 0: the
            # small last steps leave no noise in the weights.
            warm_up = min(1.0, (step + 1) / 10)
            decay = 0.5 * (1 + math.cos(math.pi * step / self._config.steps))
            self._optimizer.param_groups[0]["lr"] = self.rate * warm_up * decay
            self._gradients(self._next())
            self._optimizer.step()
            with torch.no_grad():
                for name, weight in self.weights.items():
                    weight.mul_(self._kept[name])
        self._step = until
        for weight in self.weights.values():
            weight.grad = None

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
        job, weights = self._job, self.weights
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
