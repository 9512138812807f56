"""The one loop of training with sparsity: a step moves weights, and now and then masks; nothing else
trains.
"""

from __future__ import annotations

import hashlib
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmprune.contracts import Pattern
from llmprune.recovery.keeps import Keeps
from llmprune.recovery.losses import Losses
from llmprune.recovery.masking import scaled
from llmprune.recovery.method import Method
from llmprune.recovery.optimizer import Optimizer
from llmprune.recovery.parts import Matrix, Trainable, View
from llmprune.recovery.phases import Phase
from llmprune.recovery.task import Task, Term


class Diverged(RuntimeError):
    """The loss or a weight is NaN or Inf."""


class _Weights(Mapping[str, Tensor]):
    """The weights of a step by name, made when they are read."""

    def __init__(self, loop: Loop, phase: Phase) -> None:
        # The student keeps this until it is called again, and must not keep a loop that is done with it.
        self._loop: Loop = weakref.proxy(loop)
        self._phase = phase

    def __getitem__(self, name: str) -> Tensor:
        loop = self._loop
        if name in loop.others:
            return loop.others[name]
        return loop.trained[name].weight(loop.keeps[name], self._phase)

    def __iter__(self) -> Iterator[str]:
        return iter([*self._loop.trained, *self._loop.others])

    def __len__(self) -> int:
        return len(self._loop.trained) + len(self._loop.others)


class Loop:
    """Training with sparsity, a step at a time.

    Attributes:
        keeps: the masks by name, bool.
        matrices: what the masks shall end with, by name; without weights, which the training has taken.
        trained: what is trained of each matrix, by name.
        others: the other tensors that are trained, float32, by name.
        step: how many steps are done.
        flipped: the share of mask entries that the last move has changed.
    """

    def __init__(self, task: Task, method: Method) -> None:
        self.task, self.method = task, method
        self.step, self.flipped = 0, 0.0
        self.keeps = Keeps({})
        self.others = {
            name: tensor.detach().to(torch.float32, copy=True).requires_grad_()
            for name, tensor in task.others.items()
        }
        self.trained: dict[str, Trainable] = {}
        self._sizes: dict[str, float] = {}
        self.matrices: dict[str, Matrix] = {}
        nothing = torch.empty(0, dtype=torch.float32)
        for name, matrix in task.matrices.items():  # one after the other: each may be read from a file
            self.keeps[name], self._sizes[name] = matrix.keep, self._size(matrix)
            self.trained[name] = method.trainable()
            self.trained[name].start(replace(matrix, still=method.still), self._generator(name, -1))
            self.matrices[name] = replace(matrix, weight=nothing, keep=nothing)
        self._optimizer = Optimizer(method.optimizer, method.numbers.lam > 0)
        self._shuffle = torch.Generator().manual_seed(method.seed)
        self._queue: list[int] = []
        self._batch: list[int] = []  # of the step that is being done
        self._stepped: set[str] = set()  # tensors that have moved in the step that is being done
        self._moved, self._loss = -1, 0.0  # the step before which masks moved last; the loss of the last step
        self._placed: set[str] = set()  # matrices whose mask has moved, in a move that is being done
        self._flips = [0, 0]  # entries of those masks that have changed, and all
        self._gradients: dict[str, Tensor] = {}
        self._active: dict[str, Tensor] = {}
        wants = method.rule.wants if method.rule else frozenset()
        self._wants = wants if method.schedule.config.moves else frozenset()
        if "active" in self._wants:
            self._active = {name: keep.to(torch.float32) for name, keep in self.keeps.items()}

    def _size(self, matrix: Matrix) -> float:
        """What learning rates of a matrix are relative to."""
        if not self.method.rate.relative:
            return 1.0
        kept = matrix.keep.sum().clamp(min=1)
        return math.sqrt(float(matrix.weight.double().mul(matrix.keep).square().sum() / kept)) or 1.0

    def _generator(self, name: str, step: int) -> torch.Generator:
        """A generator for everything random about a matrix at a step."""
        seed = hashlib.sha256(f"{self.method.seed} {step} {name}".encode()).digest()[:8]
        return torch.Generator().manual_seed(int.from_bytes(seed, "big") >> 1)

    def phase(self, step: int) -> Phase:
        """What holds at a step."""
        return self.method.schedule.at(step, self.method.steps, self.method.numbers)

    @property
    def done(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.method.steps

    def advance(self) -> float:
        """Do one step; returns its loss. Where memory ran out in a step, the same step is gone on with.

        Raises:
            Diverged: the loss or a weight is NaN or Inf; no weight has moved then.
        """
        if self.done:  # all but the last move of the masks
            return self._end()
        phase = self.phase(self.step)
        if phase.move and self._moved < self.step:  # else a step is done again, after memory ran out
            self._move(phase)
            self._moved = self.step
        coming = self.phase(self.step + 1).move and "gradient" in self._wants
        loss = self._backward(phase, coming)
        if not self._pauses(coming):
            self._update(phase)
            for name, trainable in self.trained.items():
                trainable.settle(self.keeps[name], phase)
        self._free_gradients()
        self._stepped.clear()
        self._batch, self.step, self._loss = [], self.step + 1, loss
        return self._end() if self.done else loss

    def _end(self) -> float:
        """Move the masks after the last step, where the schedule says so."""
        if self.phase(self.step).move:
            self._move(self.phase(self.step))
        return self._loss

    def _pauses(self, coming: bool) -> bool:
        """Whether the optimizer does not move, where a move is `coming` that the gradient decides."""
        return coming and self.method.rule is not None and self.method.rule.pauses

    def _free_gradients(self) -> None:
        for tensor in self._leaves().values():
            tensor.grad = None

    def halve(self) -> None:
        """Take half as many sequences at once, after memory ran out in a step: it can then be done again."""
        self._free_gradients()
        self.task = replace(self.task, batch=max(1, self.task.batch // 2))

    def _leaves(self) -> dict[str, Tensor]:
        """Everything that the optimizer moves, by name."""
        leaves = {
            f"{name}:{part}": tensor for name, t in self.trained.items() for part, tensor in t.tensors.items()
        }
        return leaves | self.others

    # -- gradients ------------------------------------------------------------------------------------------

    def _backward(self, phase: Phase, dense: bool) -> float:
        """Compute the gradients of the next batch; returns the loss.

        `dense`: also those of pruned weights, which are kept for the next move.
        """
        task, losses = self.task, Losses(self.task, self.method.terms)
        parts = losses.parts(self._next())
        sizes = losses.sizes(parts)
        beta, gamma, lam, rho = phase.numbers
        passing = gamma if not (dense or "moments" in self._wants) else 1.0
        seen = replace(phase, numbers=(beta, passing, lam, rho))
        total = torch.zeros(1, dtype=torch.float64)
        for number, part in enumerate(parts, 1):
            loss = losses.of(_Weights(self, seen), part, sizes)
            total += loss.detach().double().cpu()
            with self._moving_at_once(phase, dense, number == len(parts) and bool(total.isfinite())):
                if loss.requires_grad:  # learned masks that are frozen train nothing
                    loss.backward()
        self._add_penalties(seen)
        for key, tensor in self._leaves().items():
            if tensor.grad is None and key not in self._stepped:
                tensor.grad = torch.zeros_like(tensor)
        task.add(total, *(tensor.grad for tensor in self._leaves().values() if tensor.grad is not None))
        if not math.isfinite(float(total)):
            raise Diverged(f"the loss became {float(total)} at step {self.step + 1} of {self.method.steps}")
        if dense or "moments" in self._wants:
            self._part_from_pruned(dense, gamma)
        return float(total)

    @contextmanager
    def _moving_at_once(self, phase: Phase, dense: bool, last: bool) -> Iterator[None]:
        """Move every tensor as soon as its gradient is whole, and free that, where nothing else needs it."""
        needed = dense or "moments" in self._wants or self.method.clip or self.task.shared
        if needed or not last or any(t.penalises for t in self.trained.values()):
            yield
            return

        def hook(key: str) -> Callable[[Tensor], None]:
            def move(tensor: Tensor) -> None:
                if key not in self._stepped:  # else the step is done again, after memory ran out
                    self._move_leaf(key, tensor, phase, 1.0)
                tensor.grad = None
                self._stepped.add(key)

            return move

        handles = [t.register_post_accumulate_grad_hook(hook(k)) for k, t in self._leaves().items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _part_from_pruned(self, dense: bool, gamma: float) -> None:
        """Keep dense gradients for the next move; those of pruned weights do not move them.

        Nothing is copied that need not be: nobody changes a gradient in place from here on.
        """
        for name, trainable in self.trained.items():
            for part in trainable.masked:
                tensor = trainable.tensors[part]
                assert tensor.grad is not None
                if dense:
                    self._gradients[name] = tensor.grad
                if gamma != 1 and "moments" not in self._wants and not self._pauses(dense):
                    tensor.grad = torch.where(self.keeps[name], tensor.grad, tensor.grad * gamma)

    def _add_penalties(self, phase: Phase) -> None:
        """Add the gradients of what trainables add to the loss; on one process only, since gradients are
        summed.
        """
        if not self.task.mine([self.task.sequences[0]]):
            return
        for name, trainable in self.trained.items():
            if not trainable.penalises or phase.frozen:
                continue
            with torch.enable_grad():
                found = trainable.penalty(trainable.weight(self.keeps[name], phase), phase)
            if found is not None:
                found.backward()

    def _next(self) -> list[int]:
        """The sequences of the next batch, from a shuffled queue that is made anew where it runs short.

        Where there are fewer sequences than a batch has, it holds some of them more than once.
        """
        task, size = self.task, self.method.batch
        if self._batch:
            return self._batch
        if len(self._queue) < size:
            self._queue = []
        while len(self._queue) < size:
            order = torch.randperm(len(task.sequences), generator=self._shuffle).tolist()
            self._queue += [task.sequences[i] for i in order]
        self._batch, self._queue = self._queue[:size], self._queue[size:]
        return self._batch

    # -- steps ----------------------------------------------------------------------------------------------

    def _update(self, phase: Phase) -> None:
        """Move every tensor that has not moved yet."""
        scale = self._clipping(phase)
        for key, tensor in self._leaves().items():
            if key not in self._stepped:
                self._move_leaf(key, tensor, phase, scale)
                self._stepped.add(key)  # where memory runs out at a later one, it must not move again

    @torch.no_grad()
    def _move_leaf(self, key: str, tensor: Tensor, phase: Phase, scale: float) -> None:
        """Move one tensor by its gradient times `scale`."""
        method = self.method
        assert tensor.grad is not None
        if scale != 1:
            tensor.grad = tensor.grad * scale  # before the pull, which is no gradient of the loss
        rate, lam = method.rate.at(self.step, method.steps), phase.numbers[2]
        name, _, part = key.rpartition(":")
        keep = None
        if name in self.trained:
            trainable = self.trained[name]
            trainable.pull(part, phase)
            rate *= trainable.rate_of(part, self._sizes[name])
            keep = self.keeps[name] if part in trainable.masked else None
        self._optimizer.step(key, tensor, tensor.grad, rate, keep, lam)

    def _clipping(self, phase: Phase) -> float:
        """What gradients are multiplied with so that their norm, over the entries that move, is not too
        large.
        """
        if not self.method.clip:
            return 1.0
        still = phase.numbers[1] == 0 and "moments" in self._wants  # pruned weights get gradients, and stay
        masks = {
            f"{name}:{part}": self.keeps[name]
            for name, t in self.trained.items()
            for part in t.masked
            if still
        }
        total = 0.0
        for key, tensor in self._leaves().items():
            assert tensor.grad is not None
            gradient = scaled(tensor.grad, masks[key], 0.0) if key in masks else tensor.grad
            total += float(gradient.double().square().sum())
        if not math.isfinite(total):  # which would pass as a norm that is small enough
            raise Diverged(f"the gradients became {total} at step {self.step + 1} of {self.method.steps}")
        return min(1.0, self.method.clip / (math.sqrt(total) + 1e-6))

    # -- masks ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _move(self, phase: Phase) -> None:
        """Choose every mask anew, exactly; the first process decides."""
        inputs: Mapping[str, Tensor] = {}
        if "inputs" in self._wants:
            assert self.task.inputs is not None
            inputs = self.task.inputs(_Weights(self, phase))
        for name, matrix in self.matrices.items():
            if name in self._placed:  # the move is done again, after memory ran out
                continue
            old = self.keeps[name]
            view = self._view(name, matrix.aim(phase), phase, inputs.get(name))
            new = self._chosen(view)
            self.task.agree(new)
            if view.aim is not None:
                view.aim[0].check(new, view.aim[1])
            flips = new != old
            self._put(name, old, new, phase, view)
            self._placed.add(name)
            self._gradients.pop(name, None)
            self._flips = [self._flips[0] + int(flips.sum()), self._flips[1] + flips.numel()]
        self.flipped = self._flips[0] / max(1, self._flips[1])
        self._placed.clear()
        self._flips = [0, 0]

    def _put(self, name: str, old: Tensor, new: Tensor, phase: Phase, view: View) -> None:
        trainable = self.trained[name]
        before = dict(trainable.tensors)
        trainable.moved(old, new, phase, view)
        self.keeps[name] = new
        if name in self._active:
            self._active[name] += new
        for part, tensor in trainable.tensors.items():
            key = f"{name}:{part}"
            if tensor is not before.get(part):
                self._optimizer.drop(key)
            elif part in trainable.masked and not self._reaches(phase.step):
                self._optimizer.forget(key, new if self._reaches(phase.step - 1) else old & new)

    def _reaches(self, step: int) -> bool:
        """Whether gradients reach pruned weights at a step, so that their moments are those of now."""
        return "moments" in self._wants or (step >= 0 and self.phase(step).numbers[1] > 0)

    def _view(
        self, name: str, aim: tuple[Pattern, float] | None, phase: Phase, inputs: Tensor | None
    ) -> View:
        trainable = self.trained[name]
        moments = None
        if "moments" in self._wants:
            (part,) = trainable.masked or {"theta"}
            moments = self._optimizer.moments(f"{name}:{part}")
        return View(
            weight=trainable.compared(self.keeps[name]),
            keep=self.keeps[name],
            aim=aim,
            phase=phase,
            generator=self._generator(name, phase.step),
            gradient=self._gradients.get(name),
            mean=moments[0] if moments else None,
            square=moments[1] if moments else None,
            inputs=inputs,
            active=self._active.get(name),
            learned=trainable.learned(phase),
        )

    def _chosen(self, view: View) -> Tensor:
        if view.aim is None:
            return torch.ones_like(view.keep)
        assert self.method.rule is not None
        score = self.method.rule.score(view)
        if bool(score.isnan().any()):
            raise Diverged(f"a weight became NaN by step {self.step} of {self.method.steps}")
        return view.aim[0].select(score.contiguous(), view.aim[1])

    # -- results --------------------------------------------------------------------------------------------

    @property
    def exact(self) -> bool:
        """Whether every mask has its final pattern and sparsity."""
        for name, matrix in self.matrices.items():
            if matrix.pattern is None:
                continue
            try:
                matrix.pattern.check(self.keeps[name], matrix.sparsity)
            except ValueError:
                return False
        return True

    def merged(self, name: str) -> Tensor:
        """The weight of a matrix as it would be saved now, float32, exactly zero where it is pruned."""
        return self.trained[name].merge(self.keeps[name])

    def error(self, terms: tuple[Term, ...]) -> float:
        """The loss by some terms on the held-out sequences, with the weights as they would be saved."""
        return Losses(self.task, terms).held_out(_Merged(self))

    # -- going on -------------------------------------------------------------------------------------------

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that is needed to go on from here: tensors by name, and values for JSON."""
        tensors = {f"leaf/{key}": tensor.detach() for key, tensor in self._leaves().items()}
        for name, trainable in self.trained.items():
            tensors |= {f"fixed/{name}:{part}": t for part, t in trainable.kept_fixed().items()}
        tensors |= {f"keep/{name}": keep for name, keep in self.keeps.items()}
        tensors |= {f"state/{key}": tensor for key, tensor in self._optimizer.saved().items()}
        tensors |= {f"gradient/{name}": tensor for name, tensor in self._gradients.items()}
        tensors |= {f"active/{name}": tensor for name, tensor in self._active.items()}
        values = {
            "step": self.step,
            "flipped": self.flipped,
            "steps": self._optimizer.steps,
            "queue": self._queue,
        }
        tensors["shuffle/"] = self._shuffle.get_state()
        return tensors, values

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on from what `saved` returned."""
        groups: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            groups.setdefault(kind, {})[name] = tensor
        self.keeps = Keeps(groups.get("keep", {}))
        for name, trainable in self.trained.items():
            for part in trainable.tensors:
                trainable.tensors[part] = groups["leaf"][f"{name}:{part}"].requires_grad_()
        for key, tensor in groups.get("fixed", {}).items():
            name, _, part = key.rpartition(":")
            self.trained[name].fixed[part], self.trained[name].changed = tensor, True
        self.others = {name: groups["leaf"][name].requires_grad_() for name in self.others}
        self._gradients, self._active = groups.get("gradient", {}), groups.get("active", {})
        self._optimizer.restore(groups.get("state", {}), values["steps"])
        self._shuffle.set_state(groups["shuffle"][""])
        self.step, self.flipped = values["step"], values["flipped"]
        self._queue = list(values["queue"])


class _Merged(_Weights):
    """The weights as they would be saved, rounded to the dtype in which they are stored: a small rate may
    train nothing that is left of it.
    """

    def __init__(self, loop: Loop) -> None:
        super().__init__(loop, loop.phase(loop.step))

    def __getitem__(self, name: str) -> Tensor:
        loop = self._loop
        weight = loop.others[name].detach() if name in loop.others else loop.merged(name)
        return weight.to(loop.task.dtypes.get(name, weight.dtype)).to(weight.dtype)
