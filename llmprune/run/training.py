"""A training from its start to its best step: rates are tried, held-out loss is watched, the state is
kept.
"""

from __future__ import annotations

import dataclasses
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
from llmprune.checkpoint.files import WeightFile, save_tensors
from llmprune.contracts import Reporter
from llmprune.machine.processes import Team
from llmprune.recipe.recovery import RecoveryRecipe
from llmprune.record.figures import duration
from llmprune.recovery.loop import Diverged, Loop
from llmprune.recovery.objectives.block import Block
from llmprune.recovery.objectives.next_token import NextToken
from llmprune.recovery.parts import Task, Term

CHECKS = 20  # how often the held-out loss is measured, over all steps
_SAVE_EVERY = 300.0  # seconds between two states on disk
_NOTES = 5  # of the checks that are told


@dataclass
class Watch:
    """What is kept of a training beside its state.

    Attributes:
        start: the held-out loss before the first step.
        best: the lowest held-out loss of a step whose masks were exact; None before there was one.
        best_step: of it, from 1; 0 for the start.
        curve: a row per check: step, loss, held-out loss, share of mask entries flipped since the last.
        rates: the rates that were tried, with their held-out losses.
        stage: the number of the part of the training: rates tried, copies of a soup, the training itself.
    """

    start: float = math.nan
    best: float | None = None
    best_step: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    rates: list[list[float]] = field(default_factory=list)
    rate: float | None = None
    losses: float = 0.0
    since: int = 0
    flipped: float = 0.0


class Keeping(NamedTuple):
    """Where the state of a training goes.

    Attributes:
        folder: takes it; None for none, as on all processes but the first.
        told: is called when something has been written.
    """

    folder: Path | None = None
    told: Callable[[], None] = lambda: None


class Training:
    """Trains one task by one recipe; resumable at every state it has saved.

    Args:
        task: what is trained.
        recipe: how.
        steps: of the optimizer.
        keeping: where the state goes.
        team: the processes.
        reporter: is told the progress.
    """

    def __init__(
        self, task: Task, recipe: RecoveryRecipe, steps: int, keeping: Keeping, team: Team, reporter: Reporter
    ) -> None:
        self.task, self.recipe, self.steps, self.watch = task, recipe, steps, Watch()
        self._folder, self._saved_once, self._team, self._reporter = *keeping, team, reporter
        self._measure = (Term(Block() if recipe.scope == "block" else NextToken()),)
        self._last_save = self._started = time.monotonic()

    def run(self) -> Loop:
        """Train; returns the loop at its last step, whose best step is in the file `BEST_STEP`."""
        state = self._state()
        if state is None and self.recipe.rates:
            self._try_rates()
        loop = Loop(self.task, self.recipe.method(self.steps, self._rate(state)))
        if state is not None:
            self._restore(loop, *state)
        else:
            self._begin(loop)
        self._reporter.stage("training", self.steps)
        for _ in range(loop.step):
            self._reporter.step()
        self._started, self._first = time.monotonic(), loop.step
        while not loop.done:
            self._advance(loop)
        return loop

    def _rate(self, state: Any) -> float | None:
        if state is not None:
            self.watch = Watch(**state[1]["watch"])
        return self.watch.rate

    def _begin(self, loop: Loop) -> None:
        self.watch.start = loop.error(self._measure)
        if loop.exact and not self._grows(loop):
            self._keep(loop, self.watch.start)

    @staticmethod
    def _grows(loop: Loop) -> bool:
        """Whether the start is no result, since matrices that shall be sparse are dense."""
        return any(m.pattern is not None and bool(m.keep.all()) for m in loop.task.matrices.values())

    def _advance(self, loop: Loop) -> None:
        watch = self.watch
        try:
            loss = loop.advance()
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

    def _advice(self) -> str:
        rate = self.watch.rate or self.recipe.rate.rate
        return f"lower its rate, {rate:g}, with --set rate.rate={rate / 3:.1g}"

    def _check(self, loop: Loop) -> None:
        watch = self.watch
        held = loop.error(self._measure)
        if not math.isfinite(held):
            raise RuntimeError(f"the held-out loss became {held} at step {loop.step}; {self._advice()}")
        row = {
            "step": loop.step,
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
        left = duration(seconds / max(1, done) * (self.steps - loop.step))
        perplexity = (
            f", perplexity {math.exp(row['held_out_loss']):.2f}" if self.recipe.scope == "model" else ""
        )
        flips = f", {row['flipped']:.2%} of the masks flipped" if self.recipe.moves else ""
        rest = f", {left} left" if not loop.done else ""
        self._reporter.note(
            f"step {loop.step} of {self.steps}: loss {row['loss']:.4f}, held-out {row['held_out_loss']:.4f}"
            f"{perplexity}{flips}, {tokens / max(seconds, 1e-9):,.0f} tokens/s{rest}"
        )

    def _try_rates(self) -> None:
        """Train a little at each rate, and take the one with the lowest held-out loss."""
        steps = max(1, round(self.recipe.trial * self.steps))
        self._reporter.stage("trying learning rates", steps * len(self.recipe.rates))
        for rate in self.recipe.rates:
            loop = Loop(self.task, self.recipe.method(steps, rate))
            try:
                while not loop.done:
                    loop.advance()
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
        self.watch.best, self.watch.best_step = held, loop.step
        if self._folder is None:
            return
        tensors: dict[str, Tensor] = {f"keep/{name}": keep for name, keep in loop.keeps.items()}
        for name in loop.trained:
            tensors[f"weight/{name}"] = loop.merged(name).contiguous()
        tensors |= {f"other/{name}": tensor.detach() for name, tensor in loop.others.items()}
        save_tensors(self._folder / BEST_STEP, {k: t.cpu() for k, t in tensors.items()})
        self._saved_once()

    def _save(self, loop: Loop) -> None:
        self._last_save = time.monotonic()
        if self._folder is None:
            return
        tensors, values = loop.saved()
        values["watch"] = dataclasses.asdict(self.watch)
        encoded = torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)
        save_tensors(self._folder / TRAINING, {"values": encoded, **{k: t.cpu() for k, t in tensors.items()}})
        self._saved_once()

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What an earlier run has saved, told by the first process; None for nothing."""
        found = self._team.tell(self._folder and str(self._folder / TRAINING))
        if not self._team.tell(bool(found) and Path(found or "").is_file()):
            return None
        file = WeightFile(Path(found or ""))
        tensors = {name: file.load(name) for name in file.entries}
        return tensors, json.loads(bytes(tensors.pop("values").numpy()).decode())

    def _restore(self, loop: Loop, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        device = next(iter(loop.keeps.values())).device
        loop.restore({k: t if k == "shuffle/" else t.to(device) for k, t in tensors.items()}, values)
        self._reporter.note(f"{loop.step} of {self.steps} steps are done; going on from there")


def _sparsity(loop: Loop) -> float:
    """The share of pruned weights in the matrices."""
    kept = sum(int(keep.sum()) for keep in loop.keeps.values())
    return 1 - kept / max(1, sum(keep.numel() for keep in loop.keeps.values()))
