"""Training one block after the other: each has the outputs of the trained blocks before it as its input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmprune.checkpoint.overlay import Overlay
from llmprune.checkpoint.packed_tensor import Layout
from llmprune.model.activations import BlockInputs
from llmprune.model.arguments import Store
from llmprune.model.student import assembled
from llmprune.model.target import Target
from llmprune.recovery.task import Outputs, Task
from llmprune.run.lesson import Lesson, Matrices, stored_dtypes


@dataclass(frozen=True)
class Place:
    """Where block inputs are kept, and what is finished.

    Attributes:
        store: makes room for block inputs.
        finished: the files of the blocks that an earlier run has trained.
        layouts: of packed tensors in them.
    """

    store: Store
    finished: list[Path]
    layouts: Mapping[str, Layout]


class BlockTasks:
    """The tasks of the blocks, in order; between two of them `advance` moves on with the trained weights.

    The teacher's block gets what the student's gets (`own`), as in EBFT, or the outputs of the dense blocks
    before it (`dense`).
    """

    def __init__(self, lesson: Lesson, place: Place, targets_of: str) -> None:
        assert lesson.base is not None
        self._lesson, self._base = lesson, lesson.base
        skeleton = lesson.model.skeleton
        self._source = Overlay(lesson.model.source, place.finished, place.layouts)
        self._same = targets_of == "own"
        # Sequences are shared out among the processes once: their block inputs stay where they are.
        count = len(lesson.rows.tokens)
        self._share = lesson.team.share(count)
        tokens = lesson.rows.tokens[self._share]
        self._student = BlockInputs(skeleton, tokens, skeleton.device, place.store)
        self._teacher = BlockInputs(self._base.skeleton, tokens, skeleton.device, place.store)

    def __iter__(self) -> Iterator[tuple[int, Task | None]]:
        """The number of every block and its task; None for one without matrices to train."""
        skeleton, base = self._lesson.model.skeleton, self._base.skeleton
        for number, name in enumerate(skeleton.blocks):
            skeleton.fill(skeleton.parameters_of(name), self._tensors(name))
            base.load(base.parameters_of(name))
            if self._same:
                self._copy_inputs()
            self._teacher.forward(number)
            targets = self._targets_of(name)
            skeleton.free([t.parameter for t in targets if t.module is not None])  # given with every call
            yield number, self._task(number, targets) if targets else None
            base.free(base.parameters_of(name))
            skeleton.free(skeleton.parameters_of(name))

    def _targets_of(self, block: str) -> list[Target]:
        return [target for target in self._lesson.targets if target.parameter.startswith(f"{block}.")]

    def _tensors(self, block: str) -> dict[str, Tensor]:
        """The stored tensors of a block, trained where they are finished."""
        skeleton = self._lesson.model.skeleton
        return {n: self._source.load(n) for n in skeleton.tensors_of(skeleton.parameters_of(block))}

    def _copy_inputs(self) -> None:
        """The teacher's block gets the inputs of the student's."""
        for part in self._student.slices():
            self._teacher.put(part, self._student.hidden(part), None)

    def _load(self, target: Target) -> Tensor:
        stored = self._source.load(target.tensor)
        return target.oriented(target.part(stored)).to(self._lesson.model.skeleton.device).contiguous()

    def _task(self, number: int, targets: list[Target]) -> Task:
        lesson, share, name = self._lesson, self._share, list(self._lesson.model.skeleton.blocks)[number]
        model = lesson.model.skeleton.model

        def student(weights: Mapping[str, Tensor], rows: list[int]) -> Outputs:
            held = assembled(model, targets, weights)
            own = {parameter.removeprefix(f"{name}."): tensor for parameter, tensor in held.items()}
            return Outputs(None, [self._student.run(number, [r - share.start for r in rows], own)])

        def teacher(rows: list[int]) -> Outputs:
            return Outputs(None, [self._teacher.hidden([r - share.start for r in rows])])

        training, held = lesson.split
        return Task(
            matrices=Matrices(lesson, targets, self._load),
            sequences=training,
            held=held,
            tokens=lambda rows: lesson.rows.tokens[rows],
            student=student,
            teacher=teacher,
            dtypes=stored_dtypes(self._source, targets),
            mine=lambda rows: [row for row in rows if share.start <= row < share.stop],
            batch=self._student.batch,
            shared=not lesson.team.alone,
            add=lesson.team.add,
            agree=lambda keep: lesson.team.from_rank(0, keep),
        )

    @torch.no_grad()
    def advance(self, number: int, weights: Mapping[str, Tensor]) -> None:
        """Move on to the next block, with the weights that are stored of this one, by `Target.key`.

        Those of a block that an earlier run has trained are not given, but read.
        """
        skeleton = self._lesson.model.skeleton
        name = list(skeleton.blocks)[number]
        targets = self._targets_of(name)
        held = assembled(skeleton.model, targets, weights or {t.key: self._load(t) for t in targets})
        own = {parameter.removeprefix(f"{name}."): tensor for parameter, tensor in held.items()}
        self._student.forward(number, own)
