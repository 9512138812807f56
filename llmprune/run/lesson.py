"""What a recovery trains on and with whom: matrices, text rows and teacher of a model become a `Task`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llmprune.checkpoint.reader import WeightSource
from llmprune.contracts import CalibrationSet, Pattern
from llmprune.machine import device as devices
from llmprune.machine.processes import Team
from llmprune.model.activations import micro_batch
from llmprune.model.masking import Masking
from llmprune.model.opening import Model
from llmprune.model.skeleton import Skeleton
from llmprune.model.student import Student, filled
from llmprune.model.target import Target
from llmprune.model.targets import all_targets
from llmprune.patterns import exact_pattern
from llmprune.planning.plan import MatrixPlan, check_widths
from llmprune.planning.training import Extent, TrainingPlan, activations, training_plan
from llmprune.recipe.recovery import RecoveryRecipe
from llmprune.recovery.parts import Matrix, exact_sparsity
from llmprune.recovery.task import Outputs, Task
from llmprune.statistics.squares import input_squares

_SEEN = 16  # sequences by which the inputs of matrices are measured
_MOST_HELD = 1 << 14  # tokens that are held out at most
_ROOM = 0.125  # of the free memory may be taken by activations that are kept instead of computed twice


class Asked(NamedTuple):
    """How much is trained on: so many tokens, in so many epochs together."""

    tokens: int
    epochs: int


@dataclass(frozen=True)
class Lesson:
    """What a recovery is given.

    Attributes:
        model: the start: pruned, with `masking`, or dense.
        recipe: how it is trained.
        rows: the text, [N, T].
        asked: how much of it is trained on.
        team: the processes.
        masking: the masks of a pruned start; None for a dense one.
        aim: the pattern and sparsity that a dense start, or one that is pruned further, ends with.
        base: the dense model: teacher, and where revived weights start; None where none is needed.
        named: whether the user named it; else it is the one that the record of the start names.
    """

    model: Model
    recipe: RecoveryRecipe
    rows: CalibrationSet
    asked: Asked
    team: Team
    masking: Masking | None
    aim: tuple[Pattern, float] | None
    base: Model | None
    named: bool

    @functools.cached_property
    def targets(self) -> list[Target]:
        """The matrices that are trained: those with a mask, of a dense start all."""
        return self.masking.targets if self.masking else all_targets(self.model.skeleton)

    @functools.cached_property
    def split(self) -> tuple[list[int], list[int]]:
        """The numbers of the sequences to train on, and of those held out."""
        count, length = self.rows.tokens.shape
        held = held_count(count, length, self.recipe.held_out)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.recipe.seed)).tolist()
        return sorted(order[held:]), sorted(order[:held])

    @property
    def batch(self) -> int:
        """Sequences that are taken at once."""
        length = self.rows.tokens.shape[1]
        return min(self.recipe.batch, micro_batch(length, self.model.skeleton.device))

    @functools.cached_property
    def recompute(self) -> bool:
        """Whether activations are computed twice rather than kept: where they would take much memory."""
        if self.recipe.recompute != "auto":
            return self.recipe.recompute == "on"
        tokens = self.batch * self.rows.tokens.shape[1]
        return activations(self.targets, tokens, self.model.skeleton.dtype) > self.available * _ROOM

    @functools.cached_property
    def available(self) -> int:
        """Free memory in bytes, of the first process."""
        return self.team.on_first(devices.available_memory)

    def plan(self, steps: int, coming: tuple[Pattern, float] | None = None) -> TrainingPlan:
        """What it will hold in memory.

        Args:
            coming: the pattern and sparsity of a start that is not there yet.

        Raises:
            ValueError: a matrix that cannot have the pattern asked for, or that the recipe cannot train.
        """
        if self.aim is not None:
            check_widths([MatrixPlan(t.key, t.shape, self.aim[0], self.aim[1], "") for t in self.targets])
        count = len(self.rows.tokens)
        if self.recipe.scope == "block" and self.team.size > count:
            raise ValueError(
                f"{self.team.size} processes share {count} sequences of text; start at most {count}"
            )
        rule = self.recipe.method(1).rule
        stacked = next((t.key for t in self.targets if t.layer is None), None)
        if rule is not None and self.recipe.moves and "inputs" in rule.wants and stacked:
            raise ValueError(
                f"rule {self.recipe.rule and self.recipe.rule.name} looks at the inputs of layers, and "
                f"{stacked} is stacked with other experts; take a recipe with rule magnitude (sr-ste, gmp)"
            )
        skeleton, others = self.model.skeleton, plain_tensors(self.model.skeleton, self.recipe.others)
        pattern, kept = self.aim[0] if self.aim else self._pattern(), 1.0
        if coming is not None:
            pattern, kept = coming[0], 1 - coming[1]
        elif self.masking is not None:
            kept = 1 - self.masking.masks.sparsity
        extent = Extent(
            targets=self.targets,
            pattern=pattern,
            others=sum(skeleton.source.tensors[name].elements for name in others),
            batch=self.batch,
            length=self.rows.tokens.shape[1],
            sequences=len(self.rows.tokens[self.team.share(count)]),
            taught=self.recipe.teaches,
            recompute=self.recompute,
            processes=self.team.size,
            kept=kept,
        )
        return training_plan(skeleton, self.recipe, extent, steps, self.available // self.team.size)

    def _pattern(self) -> Pattern | None:
        """The pattern of the start's masks, by the first of them."""
        return exact_pattern(self.masking.keep(self.targets[0].name)) if self.masking else None

    def matrix(self, target: Target, place: float, load: Callable[[Target], Tensor]) -> Matrix:
        """A matrix as it is at the start.

        Args:
            place: where in the model, in [0, 1).
            load: gives its weight.
        """
        weight = load(target)
        keep = self._keep(target, weight)
        pattern, sparsity = self.aim_of(keep)
        return Matrix(
            weight=weight,
            keep=keep.to(weight.device),
            pattern=pattern,
            sparsity=sparsity,
            part=place,
            least=self._least(keep),
            origin=self._origin(target),
        )

    def _keep(self, target: Target, weight: Tensor) -> Tensor:
        if self.masking is None:
            return torch.ones(target.shape, dtype=torch.bool)
        return self.masking.keep(target.name)

    def aim_of(self, keep: Tensor) -> tuple[Pattern | None, float]:
        """The pattern and sparsity that a matrix ends with, by its mask at the start; no pattern for none."""
        if self.aim is not None:
            return self.aim
        if self.masking is None:
            return None, 0.0
        found = exact_pattern(keep)
        return (found, found.sparsity) if found else exact_sparsity(keep)

    def _least(self, keep: Tensor) -> float:
        """No schedule goes back below the start's sparsity where nothing would come back."""
        revived = self.base is not None and self.recipe.trainable_class().revives
        return 0.0 if self.masking is None or revived else 1 - int(keep.sum()) / keep.numel()

    def _origin(self, target: Target) -> Callable[[], Tensor] | None:
        """What gives the dense model's weight, where something may start from it."""
        dense = self.base
        if self.masking is None:  # the start is dense itself, and only what grows later starts from it
            dense = self.model if self.recipe.trainable.options.get("grown") == "dense" else None
        if dense is None:
            return None
        source, device = dense.source, self.model.skeleton.device

        def load() -> Tensor:
            return target.oriented(target.part(source.load(target.tensor))).to(device, torch.float32)

        return load


def held_count(count: int, length: int, share: float) -> int:
    """How many of so many sequences of `length` tokens are held out: about a share, not too many tokens."""
    return min(max(1, round(share * count)), max(1, _MOST_HELD // length), count - 1)


class Matrices(Mapping[str, Matrix]):
    """The matrices of some targets by name in the record, each read when it is asked for: nothing is held."""

    def __init__(self, lesson: Lesson, targets: Sequence[Target], load: Callable[[Target], Tensor]) -> None:
        self._lesson, self._load = lesson, load
        self._places = {target.key: (target, n / len(targets)) for n, target in enumerate(targets)}

    def __getitem__(self, name: str) -> Matrix:
        return self._lesson.matrix(*self._places[name], self._load)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def plain_tensors(skeleton: Skeleton, others: str) -> list[str]:
    """The stored tensors that are trained beside the matrices: vectors (`norms`), or whatever is left
    (`all`).

    Left out are those of parts beside the language model, and such as are converted when they are loaded.
    """
    if others == "none":
        return []
    targets = {target.tensor for target in all_targets(skeleton)}
    beside = tuple(f"{name}." for name in skeleton.towers())
    found: dict[str, None] = {}
    parameters = {name for name, _ in skeleton.model.named_parameters(remove_duplicate=False)}
    for name, group in skeleton.group_of.items():
        (tensor, *more) = group.tensors
        if more or group.converter is not None or name not in parameters or tensor in targets:
            continue
        info = skeleton.source.tensors[tensor]
        if name.startswith(beside) or info.dtype is None or not info.dtype.is_floating_point:
            continue
        if others == "all" or len(info.shape) == 1:
            found[tensor] = None
    return list(found)


def stored_dtypes(source: WeightSource, targets: Sequence[Target]) -> dict[str, torch.dtype]:
    """In which dtype each matrix is stored, by `Target.key`, where that is known."""
    found = {target.key: source.tensors[target.tensor].dtype for target in targets}
    return {key: dtype for key, dtype in found.items() if dtype is not None and dtype.is_floating_point}


def whole_model(lesson: Lesson) -> Task:
    """The task of training the whole model at once."""
    skeleton, recipe, team = filled(lesson.model), lesson.recipe, lesson.team
    source, device = lesson.model.source, skeleton.device

    def load(target: Target) -> Tensor:
        return target.oriented(target.part(source.load(target.tensor))).to(device).contiguous()

    matrices = Matrices(lesson, lesson.targets, load)
    names = plain_tensors(skeleton, recipe.others)
    others = {name: source.load(name).to(device) for name in names}
    tokens = lesson.rows.tokens
    batch = lesson.batch
    student = Student(skeleton, [*matrices, *others], lesson.recompute)
    skeleton.free([t.parameter for t in student.targets.values() if t.module is not None])
    terms = recipe.terms()
    hidden = any(term.objective.looks for term in terms)

    def rows_of(rows: list[int]) -> Tensor:
        return tokens[rows].to(device)

    def run(weights: Mapping[str, Tensor], rows: list[int]) -> Outputs:
        return Outputs(*student(weights, tokens[rows], hidden))

    training, held = lesson.split
    teacher = _teacher(lesson, hidden) if recipe.teaches else None

    @torch.no_grad()
    def inputs(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        seen = tokens[training[:_SEEN]].split(batch)
        return input_squares(student.layers(), lambda: [student(weights, part) for part in seen])

    return Task(
        matrices=matrices,
        sequences=training,
        held=held,
        tokens=rows_of,
        student=run,
        teacher=teacher,
        others=others,
        dtypes=stored_dtypes(source, lesson.targets) | {name: t.dtype for name, t in others.items()},
        inputs=inputs,
        mine=lambda rows: rows[team.rank :: team.size],
        batch=batch,
        shared=not team.alone,
        add=team.add,
        agree=lambda keep: team.from_rank(0, keep),
    )


def _teacher(lesson: Lesson, hidden: bool) -> Callable[[list[int]], Outputs]:
    base = lesson.base or lesson.model
    teacher, tokens = Student(filled(base), (), recompute=False), lesson.rows.tokens

    @torch.no_grad()
    def run(rows: list[int]) -> Outputs:
        return Outputs(*teacher({}, tokens[rows], hidden))

    return run
