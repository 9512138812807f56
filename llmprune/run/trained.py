"""What was trained, put into the output folder block by block: weights, masks, and a row for each matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from llmprune.checkpoint.contents import BEST_STEP
from llmprune.checkpoint.files import WeightFile
from llmprune.checkpoint.masks import pack
from llmprune.checkpoint.reader import TensorInfo, WeightSource, read_ahead
from llmprune.checkpoint.shard import Shard
from llmprune.checkpoint.writer import CheckpointWriter
from llmprune.contracts import Pattern
from llmprune.model.target import Target
from llmprune.numerics.counts import all_finite, zeros_of
from llmprune.patterns import NM, exact_pattern
from llmprune.record.figures import Record
from llmprune.run.clock import Clock
from llmprune.run.lesson import Lesson, plain_tensors
from llmprune.run.reporter import RunReporter

Load = Callable[[str], Tensor]


class Trained:
    """A weight source in which trained tensors replace those of another source.

    Args:
        source: the other one.
        tensors: those that replace, by name, in the dtype in which they are stored.
    """

    def __init__(self, source: WeightSource, tensors: Mapping[str, Tensor]) -> None:
        self._source, self._own = source, tensors

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors, by name."""
        return self._source.tensors

    def load(self, name: str) -> Tensor:
        """One tensor on the CPU, dense."""
        return self._own[name] if name in self._own else self._source.load(name)

    def check(self) -> None:
        """Raise `ValueError` if the source has changed."""
        self._source.check()


class TrainedWriter:
    """Writes the blocks of a model with their trained matrices.

    Args:
        lesson: model and matrices.
        writer: of the output; None on processes that write none.
        rows: of the record of the start, by matrix.
        reporter: is told the progress.
    """

    def __init__(
        self,
        lesson: Lesson,
        writer: CheckpointWriter | None,
        rows: Mapping[str, Record],
        reporter: RunReporter,
    ) -> None:
        self._lesson, self._writer, self._rows, self._reporter = lesson, writer, rows, reporter

    def block(
        self, number: int, best: Mapping[str, Tensor], about: Record, clock: Clock
    ) -> dict[str, Tensor]:
        """Write a block that was trained by itself.

        Args:
            number: of the block.
            best: `keep/` and `weight/` of each matrix that was trained.
            about: what its rows say of the training.
            clock: with the seconds so far.

        Returns:
            Its trained weights [R, C] as they are stored, by matrix, on the model's device.
        """
        model = self._lesson.model
        skeleton = model.skeleton
        targets = [t for t in self._lesson.targets if f"keep/{t.key}" in best]
        tensors = {n: model.source.load(n) for n in skeleton.block_tensors()[number]}
        self._put(number, tensors, targets, lambda key: best[key].cpu(), clock, {"training": about})
        return {t.key: t.oriented(t.part(tensors[t.tensor])).to(skeleton.device) for t in targets}

    def whole(self, clock: Clock) -> dict[str, Tensor]:
        """Write all blocks that are not written yet, from the file of the best step.

        Returns:
            The other tensors that were trained, by name, as they are stored.
        """
        assert self._writer is not None
        lesson, model = self._lesson, self._lesson.model
        best = WeightFile(self._writer.folder / BEST_STEP)
        others = {
            name: best.load(f"other/{name}").to(model.source.tensors[name].dtype)
            for name in plain_tensors(model.skeleton, lesson.recipe.others)
        }
        names, done = list(model.skeleton.blocks), len(self._writer.finished)
        self._reporter.stage("writing blocks", len(names))
        for _ in range(done):
            self._reporter.step()
        left = read_ahead(model.source, model.skeleton.block_tensors()[done:])
        for number, tensors in enumerate(left, done):
            mine = [t for t in lesson.targets if t.parameter.startswith(f"{names[number]}.")]
            trained = {name: others.get(name, tensor) for name, tensor in tensors.items()}
            self._put(number, trained, mine, best.load, clock, {})
            self._reporter.step()
        return others

    def _put(
        self,
        number: int,
        tensors: dict[str, Tensor],
        targets: list[Target],
        load: Load,
        clock: Clock,
        about: Record,
    ) -> None:
        """Put the trained matrices among the tensors of a block, in place, and write it."""
        masks: dict[str, Tensor] = {}
        rows = [self._row(target, tensors, masks, load) | about for target in targets]
        if self._writer:
            shared = self._lesson.model.skeleton.shared
            shard = {name: tensor for name, tensor in tensors.items() if name not in shared}
            self._writer.block(number + 1, Shard(shard, masks, rows), clock.seconds)

    def _row(
        self, target: Target, tensors: dict[str, Tensor], masks: dict[str, Tensor], load: Load
    ) -> Record:
        """Put the trained weight of a matrix among the tensors, in place, and keep its mask; its row."""
        keep, weight = load(f"keep/{target.key}"), load(f"weight/{target.key}")
        stored = target.oriented(target.part(tensors[target.tensor]))
        stored.copy_(torch.where(keep, weight, 0.0))
        if not all_finite(stored):
            raise RuntimeError(
                f"{target.key} is NaN or Inf in {str(stored.dtype).removeprefix('torch.')} after training; "
                "lower the rate with --set rate.rate="
            )
        aim, name = self._aim(target, keep), self._lesson.recipe.name
        masks[target.key] = pack(keep)
        old, zeros = self._rows.get(target.key, {}), zeros_of(stored)
        return {
            "name": target.key,
            "shape": list(target.shape),
            "pattern": str(aim or exact_pattern(keep) or "unstructured"),
            "target_sparsity": self._target_sparsity(old, keep),
            "sparsity": zeros / keep.numel(),
            "zeros": zeros,
            "relative_error": None,
            "pruner": old.get("pruner", name),
            "steps": [*old.get("steps", []), name],
            "seconds": old.get("seconds", 0.0),
        }

    def _target_sparsity(self, old: Record, keep: Tensor) -> float:
        """What was asked for: here, else of the start, else what its mask has."""
        if self._lesson.aim is not None:
            return self._lesson.aim[1]
        return float(old.get("target_sparsity", 1 - int(keep.sum()) / keep.numel()))

    def _aim(self, target: Target, keep: Tensor) -> Pattern | None:
        """The pattern that was asked for, against which the mask is checked; None for the start's own."""
        lesson = self._lesson
        if lesson.aim is not None:
            lesson.aim[0].check(keep, lesson.aim[1])
            return lesson.aim[0]
        if lesson.masking is not None:
            given = lesson.masking.keep(target.name)
            pattern, sparsity = lesson.aim_of(given)
            if int(given.sum()) != int(keep.sum()):
                raise RuntimeError(
                    f"the mask of {target.key} keeps {int(keep.sum())}, not {int(given.sum())}"
                )
            if isinstance(pattern, NM):
                pattern.check(keep, sparsity)
                return pattern
        return None
