"""A training from its start to its best step: rates are tried, copies averaged, held-out loss watched, and
the state kept.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmprune.checkpoint.contents import BEST_STEP, TRAINING
from llmprune.checkpoint.files import Made, WeightFile, save_made, save_tensors
from llmprune.common.messages import duration
from llmprune.contracts import Reporter
from llmprune.machine import device as devices
from llmprune.machine.processes import Team
from llmprune.recipe.recovery import RecoveryRecipe
from llmprune.recovery.loop import Diverged, Loop
from llmprune.recovery.objectives.next_token import NextToken
from llmprune.recovery.soup import Soup, part_pruned
from llmprune.recovery.task import Task, Term

CHECKS = 20  # how often the held-out loss is measured, over all steps
_TRIED = 20  # steps at each rate at least
_SAVE_EVERY = 300.0  # seconds between two states on disk
_NOTES = 5  # of the checks that are told

Tensors = dict[str, Tensor]


@dataclass
class Watch:
    """What is kept of a training beside its state.

    Attributes:
        start: the held-out loss before the first step.
        best: the lowest held-out loss of a step whose masks were exact; None before there was one.
        best_step: of it, from 1; 0 for the start.
        curve: a row per check: step, loss, held-out loss, share of mask entries flipped, sparsity.
        rates: the rates that were tried, with their held-out losses; -1 for one that diverged.
        rate: the one that was chosen; None for the recipe's.
        stage: which training of a soup this is.
        averaged: the held-out loss of the average of a soup; None without one.
        losses, since, flipped: of the steps since the last check.
        seconds: that it took, in earlier processes too, up to the state that was saved last.
    """

    start: float = math.nan
    best: float | None = None
    best_step: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    rates: list[list[float]] = field(default_factory=list)
    rate: float | None = None
    stage: int = 0
    averaged: float | None = None
    losses: float = 0.0
    since: int = 0
    flipped: float = 0.0
    seconds: float = 0.0


class Keeping(NamedTuple):
    """Where a training puts its state and its best step.

    Attributes:
        folder: takes both; None for none, as on all processes but the first.
        told: is called when something has been written.
        memory: hold the best step in memory instead, and no state.
    """

    folder: Path | None = None
    told: Callable[[], None] = lambda: None
    memory: bool = False


class Training:
    """Trains one task by one recipe; resumable at every state it has saved.

    Args:
        task: what is trained.
        recipe: how.
        steps: of the optimizer, over all copies of a soup.
        keeping: where the state goes.
        team: the processes.
        reporter: is told the progress.

    Attributes:
        watch: what came of it.
        best: the best step, where it is held in memory: `keep/NAME`, `weight/NAME` and `other/NAME`.
    """

    def __init__(
        self, task: Task, recipe: RecoveryRecipe, steps: int, keeping: Keeping, team: Team, reporter: Reporter
    ) -> None:
        self.task, self.recipe, self.watch, self.best = task, recipe, Watch(), Tensors()
        self._stages = recipe.soup.phases * recipe.soup.copies
        self._each = max(1, steps // self._stages)
        self.steps = self._each * self._stages
        self._keeping, self._team, self._reporter = keeping, team, reporter
        block = recipe.scope == "block"
        self._measure = recipe.terms() if block else (Term(NextToken()),)
        self._soup: Soup | None = Soup() if self._stages > 1 else None
        self._last_save = self._started = self._entered = time.monotonic()
        self._first, self._before = 0, 0.0

    def run(self) -> None:
        """Train; afterwards the weights of the best step are where `keeping` says."""
        state = self._state()
        if state is not None:
            self.watch = Watch(**state[1]["watch"])
            self._before = self.watch.seconds
        elif self.recipe.rates:
            self._try_rates()
        self._reporter.stage("training", self.steps)
        for _ in range(self.watch.stage * self._each):
            self._reporter.step()
        task = self.task
        for stage in range(self.watch.stage, self._stages):
            self.watch.stage = stage
            if self._soup is not None:
                task = self._soup_task(task, stage, state)
            loop = self._loop(task)
            if state is not None:
                self._restore(loop, *state)
                state = None
            elif stage == 0:
                self._begin(loop)
            self._train(loop)
            if self._soup is not None:
                self._soup.add(loop)
        if self._soup is not None and self.recipe.soup.copies > 1:
            self._check_average()
        self._count_seconds()

    def _soup_task(self, task: Task, stage: int, state: Any) -> Task:
        """The task of one training of a soup: the average of the copies before, pruned a little more."""
        assert self._soup is not None
        phase, copy = divmod(stage, self.recipe.soup.copies)
        if state is not None:
            self._soup.restore({k: t for k, t in state[0].items() if k.startswith("soup/")})
        elif copy == 0:
            task = part_pruned(self._soup.averaged(task), phase, self.recipe.soup.phases)
            self._soup.begin(task)
        return self._soup.task(self.task)

    def _check_average(self) -> None:
        """Measure the average of the last copies; it is kept where it is the best."""
        assert self._soup is not None
        loop = self._loop(self._soup.averaged(self.task))
        held = loop.error(self._measure)
        better = loop.exact and (self.watch.best is None or held < self.watch.best)
        if better:
            self._keep(loop, held)
            self.watch.best_step = self.steps
        self.watch.averaged = round(held, 6)
        verdict = "is taken" if better else "is not better than the best step"
        self._reporter.note(
            f"the average of {self.recipe.soup.copies} copies: held-out {held:.4f}, which {verdict}"
        )

    def _loop(self, task: Task) -> Loop:
        method = self.recipe.method(self._each, self.watch.rate)
        return Loop(task, dataclasses.replace(method, seed=method.seed + self.watch.stage))

    def _begin(self, loop: Loop) -> None:
        self.watch.start = loop.error(self._measure)
        if loop.exact and not _grows(loop):
            self._keep(loop, self.watch.start)

    def _train(self, loop: Loop) -> None:
        for _ in range(loop.step):
            self._reporter.step()
        self._started, self._first = time.monotonic(), loop.step
        while not loop.done:
            self._advance(loop)

    def _advance(self, loop: Loop) -> None:
        watch = self.watch
        try:
            loss = self._tried(loop)
        except Diverged as error:
            raise RuntimeError(f"{error}; {self._advice()}") from None
        watch.losses, watch.since = watch.losses + loss, watch.since + 1
        watch.flipped += loop.flipped if loop.phase(loop.step - 1).move else 0.0
        self._reporter.step()
        every = max(1, self.steps // CHECKS)
        if loop.step % every == 0 or loop.done:
            self._check(loop)
        late = self._team.tell(time.monotonic() - self._last_save > _SAVE_EVERY)
        if late and not loop.done:
            self._save(loop)

    def _done(self, loop: Loop) -> int:
        """How many steps are done, those of earlier copies included."""
        return self.watch.stage * self._each + loop.step

    def _tried(self, loop: Loop) -> float:
        """One step; where memory runs out, with fewer sequences at once."""
        try:
            return loop.advance()
        except (RuntimeError, MemoryError) as error:
            final = isinstance(error, Diverged) or loop.task.batch == 1
            # Other processes wait for the sums of this step, so that one alone cannot do it again.
            if final or loop.task.shared or not devices.out_of_memory(error):
                raise
            loop.halve()
            devices.free_cached_memory(next(iter(loop.keeps.values())).device)
            self._reporter.note(f"out of memory; going on with {loop.task.batch} sequences at once")
        return self._tried(loop)

    def _advice(self) -> str:
        rate = self.watch.rate or self.recipe.rate.rate
        return f"lower its rate, {rate:g}, with --set rate.rate={rate / 3:.1g}"

    def _check(self, loop: Loop) -> None:
        watch = self.watch
        held = loop.error(self._measure)
        if not math.isfinite(held):
            raise RuntimeError(f"the held-out loss became {held} at step {loop.step}; {self._advice()}")
        row = {
            "step": self._done(loop),
            "loss": round(watch.losses / watch.since, 6),
            "held_out_loss": round(held, 6),
            "flipped": round(watch.flipped, 6),
            "sparsity": round(_sparsity(loop), 6),
        }
        watch.curve.append(row)
        watch.losses, watch.since, watch.flipped = 0.0, 0, 0.0
        if loop.exact and (watch.best is None or held < watch.best):
            self._keep(loop, held)
        if len(watch.curve) == 1 or len(watch.curve) % (CHECKS // _NOTES) == 0 or loop.done:
            self._tell(loop, row)

    def _tell(self, loop: Loop, row: Mapping[str, Any]) -> None:
        done = loop.step - self._first
        seconds = time.monotonic() - self._started
        tokens = done * self.recipe.batch * self.task.tokens([self.task.sequences[0]]).shape[1]
        left = duration(seconds / max(1, done) * (self.steps - row["step"]))
        perplexity = (
            f", perplexity {math.exp(row['held_out_loss']):.2f}" if self.recipe.scope == "model" else ""
        )
        flips = f", {row['flipped']:.2%} of the masks flipped" if self.recipe.moves else ""
        rest = f", {left} left" if row["step"] < self.steps else ""
        self._reporter.note(
            f"step {row['step']} of {self.steps}: loss {row['loss']:.4f}, held-out {row['held_out_loss']:.4f}"
            f"{perplexity}{flips}, {tokens / max(seconds, 1e-9):,.0f} tokens/s{rest}"
        )

    def _try_rates(self) -> None:
        """Train a little at each rate, and take the one with the lowest held-out loss."""
        # In fewer steps a high rate has no time to be the better one.
        steps = min(self._each, max(_TRIED, round(self.recipe.trial * self._each)))
        phases = self.recipe.soup.phases
        task = part_pruned(self.task, 0, phases) if phases > 1 else self.task
        self._reporter.stage("trying learning rates", steps * len(self.recipe.rates))
        for rate in self.recipe.rates:
            loop = None  # its memory is free before the next one begins
            loop = Loop(task, self.recipe.method(steps, rate))
            try:
                while not loop.done:
                    self._tried(loop)
                    self._reporter.step()
                held = loop.error(self._measure)
            except Diverged:
                held = math.inf
            self.watch.rates.append([rate, round(held, 6) if math.isfinite(held) else -1.0])
        finite = [pair for pair in self.watch.rates if pair[1] >= 0]
        if not finite:
            raise RuntimeError(
                f"the loss became NaN at every rate of {list(self.recipe.rates)}; give lower ones"
            )
        self.watch.rate = min(finite, key=lambda pair: pair[1])[0]
        told = ", ".join(f"{rate:g}: {held:.4f}" for rate, held in finite)
        self._reporter.note(
            f"learning rate {self.watch.rate:g}, by held-out loss after {steps} steps ({told})"
        )

    # -- state on disk --------------------------------------------------------------------------------------

    def _keep(self, loop: Loop, held: float) -> None:
        """Keep the weights of this step as the best ones."""
        self.watch.best, self.watch.best_step = held, self._done(loop)
        if self._keeping.folder is None and not self._keeping.memory:
            return
        if self._keeping.memory:
            self.best = {name: made.make().clone() for name, made in _result(loop).items()}
            return
        assert self._keeping.folder is not None
        save_made(self._keeping.folder / BEST_STEP, _result(loop))
        self._keeping.told()

    def _count_seconds(self) -> None:
        self.watch.seconds = round(self._before + time.monotonic() - self._entered, 3)

    def _save(self, loop: Loop) -> None:
        self._last_save = time.monotonic()
        self._count_seconds()
        if self._keeping.folder is None:
            return
        tensors, values = loop.saved()
        values["watch"] = dataclasses.asdict(self.watch)
        tensors["values"] = torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)
        tensors |= self._soup.saved() if self._soup else {}
        save_tensors(self._keeping.folder / TRAINING, tensors)
        self._keeping.told()

    def _state(self) -> tuple[Tensors, dict[str, Any]] | None:
        """What an earlier run has saved, read where the first process says; None for nothing."""
        folder = self._keeping.folder
        found = self._team.tell(str(folder / TRAINING) if folder and (folder / TRAINING).is_file() else None)
        if found is None:
            return None
        file = WeightFile(Path(found))
        tensors = {name: file.load(name) for name in file.entries}
        return tensors, json.loads(bytes(tensors.pop("values").numpy()).decode())

    def _restore(self, loop: Loop, tensors: Tensors, values: dict[str, Any]) -> None:
        device = next(iter(loop.keeps.values())).device
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith("soup/")}
        loop.restore({k: t if k == "shuffle/" else t.to(device) for k, t in own.items()}, values)
        self._reporter.note(f"{self._done(loop)} of {self.steps} steps are done; going on from there")


def _result(loop: Loop) -> dict[str, Made]:
    """What a loop would be saved as: masks, weights and other tensors, each made when it is written."""
    found: dict[str, Made] = {}
    for name, keep in loop.keeps.items():
        found[f"keep/{name}"] = Made.of(keep)
        merged = functools.partial(loop.merged, name)
        found[f"weight/{name}"] = Made(torch.float32, tuple(keep.shape), merged)
    for name, tensor in loop.others.items():
        found[f"other/{name}"] = Made.of(tensor)
    return found


def _grows(loop: Loop) -> bool:
    """Whether the start is no result, since matrices that shall be sparse are dense."""
    sparse = (name for name, m in loop.matrices.items() if m.pattern is not None and m.sparsity > 0)
    return any(bool(loop.keeps[name].all()) for name in sparse)


def _sparsity(loop: Loop) -> float:
    """The share of pruned weights in the matrices."""
    kept = sum(int(keep.sum()) for keep in loop.keeps.values())
    return 1 - kept / max(1, sum(keep.numel() for keep in loop.keeps.values()))
