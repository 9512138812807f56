"""Block tuning (as in EBFT, arXiv 2402.12419): a few hundred AdamW steps on a block's kept weights against the dense model's outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.contracts import BlockJob, BlockStep, Tuned
from llmprune.numerics.gram import finite


class BlockTune(BlockStep):
    """Brings the pruned block, on inputs from the pruned blocks before it, near to what the dense model has at this place.

    The loss is the squared error over the squared outputs, on calibration sequences alone. Some of them are held out: after an
    eighth of the steps the run with the lowest error on those goes on, and unless it lowers that error, the weights stay as they were.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`steps` of AdamW on `batch` sequences each, the rate falling by a cosine. Of several `rates` the best after an eighth goes on.

        `held_out`: share of the sequences that are not trained on.
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
        """Each rate runs an eighth of the steps, the best of them the rest."""
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
        aside = min(max(1, round(self.config.held_out * job.sequences)), job.sequences - 1)
        held, training = order[:aside], order[aside:]
        seed = int(torch.randint(1 << 62, (1,), generator=job.generator))
        run, lowest = None, math.inf
        kept = {
            name: keep.float() for name, keep in job.keeps.items()
        }  # a product with bool is several times slower
        for rate in self.config.rates:
            other = _Descent(self.config, job, kept, training, rate, seed)
            other.go_on(max(1, self.config.steps // 8))
            reached = finite(_error(job, other.weights, held)) if len(self.config.rates) > 1 else 0.0
            if run is None or reached < lowest:
                run, lowest = other, reached
            del other
        assert run is not None
        run.go_on(self.config.steps)
        before, after = _error(job, job.weights, held), _error(job, run.weights, held)
        applied = after < before
        notes = {"rate": run.rate, "held_out_before": before, "held_out_after": after, "applied": applied}
        return Tuned(
            {name: weight.detach() for name, weight in run.weights.items()} if applied else job.weights,
            {"tune": notes},
        )


class _Descent:
    """One run of AdamW at one rate: it can stop after some steps and go on."""

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
        """Steps up to number `until`."""
        for step in range(self._step, until):
            # A short warm-up, then half a cosine: the last steps are small and leave no noise in the weights.
            warm, fall = min(1.0, (step + 1) / 10), 0.5 * (1 + math.cos(math.pi * step / self._config.steps))
            self._optimizer.param_groups[0]["lr"] = self.rate * warm * fall
            self._gradients(self._next())
            self._optimizer.step()
            with torch.no_grad():
                for name, weight in self.weights.items():
                    weight.mul_(self._kept[name])
        self._step = until
        for weight in self.weights.values():
            weight.grad = None

    def _next(self) -> list[int]:
        if len(self._queue) < self._config.batch:
            self._queue = [
                self._training[i]
                for i in torch.randperm(len(self._training), generator=self._generator).tolist()
            ]
        batch, self._queue = self._queue[: self._config.batch], self._queue[self._config.batch :]
        return batch

    def _gradients(self, batch: list[int]) -> None:
        """Gradients of the batch's loss, the same on every process. Those of pruned weights do no harm: they are reset after the step."""
        job, weights = self._job, self.weights
        for weight in weights.values():
            weight.grad = torch.zeros_like(weight)
        size = torch.zeros((), dtype=torch.float64)
        for part in _parts(job, batch):
            with torch.enable_grad():
                targets = job.targets(part).float()
                lost = (job.outputs(weights, part).float() - targets).square().sum()
                lost.backward()
            size += targets.square().sum().double().cpu()
        job.add(size, *(weight.grad for weight in weights.values()))
        for weight in weights.values():
            assert weight.grad is not None
            weight.grad.div_(float(size))


@torch.no_grad()
def _error(job: BlockJob, weights: Mapping[str, Tensor], held: list[int]) -> float:
    """Squared error over squared outputs on some sequences."""
    sums = torch.zeros(2, dtype=torch.float64)
    for part in _parts(job, held):
        targets = job.targets(part).float()
        sums[0] += (job.outputs(weights, part).float() - targets).square().sum().double().cpu()
        sums[1] += targets.square().sum().double().cpu()
    job.add(sums)
    return float(sums[0] / sums[1])


def _parts(job: BlockJob, sequences: list[int]) -> list[list[int]]:
    """The sequences this process holds, no more at once than fit."""
    mine = [s for s in sequences if s in job.mine]
    return [mine[i : i + job.batch] for i in range(0, len(mine), job.batch)]
